"""Copies between block lists: every pair in its place, whatever runs the ids form and however large a piece is, by the
compiled loop and by Python."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport import native
from transport.base import Blocks, Region
from transport.copying import LARGEST_ASSIGNED_BYTES, LARGEST_PIECE_BYTES, MAX_PIECES_KEPT, copy_pairs, plans_of_blocks
from transport.regions import Span

NUM_BLOCKS = 12


@pytest.fixture(autouse=True, scope="module", params=["compiled", "python"])
def _loop(request: pytest.FixtureRequest) -> Iterator[None]:
    native.compile_now()
    compiled = native.compiled()
    if request.param == "compiled" and compiled is None:
        pytest.skip("needs numba, which comes with vLLM")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_compiled", compiled if request.param == "compiled" else None)
        yield


ids = st.lists(st.integers(0, NUM_BLOCKS - 1), unique=True, max_size=NUM_BLOCKS)


@settings(deadline=None)
@given(ids, ids, st.sampled_from([(8, 8), (8, 11), (LARGEST_ASSIGNED_BYTES + 8, LARGEST_ASSIGNED_BYTES + 8)]))
def test_every_pair_is_copied_and_nothing_else(left: list[int], right: list[int], sizes: tuple[int, int]) -> None:
    count = min(len(left), len(right))
    source_ids, target_ids = tuple(left[:count]), tuple(right[:count])
    size, stride = sizes
    source = ctypes.create_string_buffer(b"".join(bytes([65 + index]) * stride for index in range(NUM_BLOCKS)))
    target = ctypes.create_string_buffer(b"." * (NUM_BLOCKS * stride))
    spans = [
        Span(Region(0, ctypes.addressof(memory), size, stride, NUM_BLOCKS), 0, size) for memory in (source, target)
    ]
    copy_pairs(spans[0], source_ids, spans[1], target_ids)
    expected = bytearray(b"." * (NUM_BLOCKS * stride))
    for source_id, target_id in zip(source_ids, target_ids, strict=True):
        expected[target_id * stride : target_id * stride + size] = bytes([65 + source_id]) * size
    assert target.raw[:-1] == bytes(expected)


@pytest.mark.parametrize("count", [1, 4, MAX_PIECES_KEPT + 1])
def test_unequal_lists_are_copied_not_even_in_part(count: int) -> None:
    memory = ctypes.create_string_buffer(b"ab" * (MAX_PIECES_KEPT + 8))
    span = Span(Region(0, ctypes.addressof(memory), 2, 2, MAX_PIECES_KEPT + 8), 0, 2)
    before = memory.raw
    with pytest.raises(ValueError, match="cannot be copied"):
        copy_pairs(span, range(count), span, range(2, count + 3))
    assert memory.raw == before


def test_more_pieces_than_are_remembered_are_copied_too() -> None:
    count = MAX_PIECES_KEPT + 10
    source, target = (ctypes.create_string_buffer(bytes([fill]) * count) for fill in (7, 0))
    spans = [Span(Region(0, ctypes.addressof(memory), 1, 1, count), 0, 1) for memory in (source, target)]
    numbers = range(0, count, 2)
    copy_pairs(spans[0], [*numbers, *range(1, count, 2)][: count - 3], spans[1], range(count - 3))
    assert target.raw[:-1] == b"\x07" * (count - 3) + bytes(3)


def test_one_plan_serves_every_layer_and_each_range_inside_the_blocks() -> None:
    layers = [ctypes.create_string_buffer(bytes(range(16 * layer, 16 * layer + 16))) for layer in range(3)]
    target = ctypes.create_string_buffer(bytes(32))
    there = Region(9, ctypes.addressof(target), 4, 8, 4)
    for layer, memory in enumerate(layers):
        here = Region(layer, ctypes.addressof(memory), 4, 4, 4)
        local, remote = Blocks(layer, (2, 0), 1, 2), Blocks(9, (1, 3), 2)
        (plan,) = plans_of_blocks(here, local, there, remote)
        plan.carry_out(here.address + local.start, there.address + remote.start)
        of_layer = bytes(range(16 * layer, 16 * layer + 16))
        expected = bytearray(32)
        expected[10:12], expected[26:28] = of_layer[9:11], of_layer[1:3]
        assert target.raw[:-1] == bytes(expected)


@pytest.mark.parametrize(
    ("local", "remote"),
    [
        (Blocks(0, (0, NUM_BLOCKS)), Blocks(0, (0, 1))),
        (Blocks(0, (0, 1)), Blocks(0, (0, -1))),
        (Blocks(0, (0, 1)), Blocks(0, (0,))),
        (Blocks(0, (0, 1), 4), Blocks(0, (0, 1))),
        (Blocks(0, (0, 1), 8), Blocks(0, (0, 1), 8)),
        (Blocks(0, (0,), -1, 4), Blocks(0, (0,), 0, 4)),
    ],
)
def test_what_does_not_fit_has_no_plan_also_when_asked_again(local: Blocks, remote: Blocks) -> None:
    region = Region(0, 4096, 8, 8, NUM_BLOCKS)
    for _ in range(2):
        assert plans_of_blocks(region, local, region, remote) == []
    assert plans_of_blocks(region, Blocks(0, (0, 1)), region, Blocks(0, (2, 3)))


def test_a_long_list_of_which_something_does_not_fit_has_no_plan_either() -> None:
    count = MAX_PIECES_KEPT + 2
    region = Region(0, 4096, 8, 8, count)
    ids = tuple(range(count))
    assert sum(plan.num_bytes for plan in plans_of_blocks(region, Blocks(0, ids), region, Blocks(0, ids))) == 8 * count
    for wrong in ((*ids[:-1], count), ids[:-1], ids[: MAX_PIECES_KEPT - 1]):
        assert plans_of_blocks(region, Blocks(0, ids), region, Blocks(0, wrong)) == []


@pytest.mark.parametrize(
    ("size", "in_a_run", "apart"),
    [(LARGEST_PIECE_BYTES // 4, 3, 9), (LARGEST_PIECE_BYTES // 2 + 4, 9, 9), (2 * LARGEST_PIECE_BYTES, 9, 9)],
)
def test_neighbours_are_one_piece_as_far_as_several_threads_still_have_their_share(
    size: int, in_a_run: int, apart: int
) -> None:
    region = Region(0, 0, size, size, 18)
    for numbers, expected in ((tuple(range(9)), in_a_run), (tuple(range(0, 18, 2)), apart)):
        (plan,) = plans_of_blocks(region, Blocks(0, numbers), region, Blocks(0, numbers))
        assert plan.num_bytes == 9 * size
        assert plan.num_pieces == expected
