"""One word names a topology."""

from __future__ import annotations

import pytest

from cluster import cores
from core.errors import ConfigError
from core.topology import Topology


@pytest.mark.parametrize(
    ("text", "numbers"), [("1P1D", (1, 1)), ("2p3d", (2, 3)), ("0P1D", (0, 1)), ("12P10D", (12, 10))]
)
def test_reads_xpyd(text: str, numbers: tuple[int, int]) -> None:
    topology = Topology.parse(text)
    assert (topology.num_prefill, topology.num_decode) == numbers
    assert str(topology) == text.upper()


@pytest.mark.parametrize("text", ["", "1P", "P1D", "1P1D1", "1D1P", "1P0D", "-1P1D", "1 P 1 D"])
def test_refuses_anything_else_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="1P1D"):
        Topology.parse(text)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, [(0, 1, 2, 3)]),
        (2, [(0, 1), (2, 3)]),
        (3, [(0,), (1,), (2,)]),
        (4, [(0,), (1,), (2,), (3,)]),
        (6, [(0,), (1,), (2,), (3,), (0,), (1,)]),
    ],
)
def test_instances_get_equal_shares_of_the_cores(count: int, expected: list[tuple[int, ...]]) -> None:
    assert cores.shares([0, 1, 2, 3], count) == expected


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([1, 1], [(0, 1), (2, 3)]),
        ([2, 2], [(0, 1), (2, 3)]),
        ([3, 1], [(0, 1, 2), (3,)]),
        ([2, 1], [(0, 1), (2,)]),
        ([4, 1], [(0, 1), (2, 3)]),
    ],
)
def test_ranks_get_equal_shares_and_share_no_core_with_another_instance(
    ranks: list[int], expected: list[tuple[int, ...]]
) -> None:
    assert cores.shares_of_instances([0, 1, 2, 3], ranks) == expected


def test_reads_vllms_notation_of_cores() -> None:
    assert cores.parse("0,2-4") == (0, 2, 3, 4)
    assert cores.parse("0,1|4,5") == (0, 1, 4, 5)
    assert cores.parse("nobind") == ()
    with pytest.raises(ValueError, match="invalid literal"):
        cores.parse("all")
