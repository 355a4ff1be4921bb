"""Block lists against registered memory: what lies outside is refused, also when it is asked again."""

from __future__ import annotations

import pytest

from core.errors import TransferError
from transport.base import Blocks, Region
from transport.regions import resolve

NUM_BLOCKS = 12


@pytest.mark.parametrize("wrong", [(-1, 2), (3, 12), (5, 1 << 40)])
def test_ids_outside_the_region_are_refused_also_when_asked_again(wrong: tuple[int, int]) -> None:
    region = Region(0, 4096, 8, 8, NUM_BLOCKS)
    for _ in range(2):
        with pytest.raises(TransferError, match="outside own region 0 of 12 blocks"):
            resolve({0: region}, Blocks(0, wrong), "own")
    assert resolve({0: region}, Blocks(0, ()), "own").num_bytes == 8
