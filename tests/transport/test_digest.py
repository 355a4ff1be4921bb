"""The digest: order of travel does not matter, place does, and so does every byte or every line."""

from __future__ import annotations

import ctypes
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.base import Region
from transport.digest import add, block_digest, blocks_digest, bytes_digest


class Memory:
    """A region over a buffer with random content."""

    def __init__(self, block_bytes: int = 4096, num_blocks: int = 4, layer: int = 0, seed: int = 1) -> None:
        self.content = bytearray(random.Random(seed).randbytes(block_bytes * num_blocks))
        self._anchor = ctypes.c_char.from_buffer(self.content)
        self.region = Region(layer, ctypes.addressof(self._anchor), block_bytes, block_bytes, num_blocks)


def test_the_sum_does_not_depend_on_the_order_of_travel() -> None:
    region = Memory().region
    parts = [blocks_digest(region, [block_id], position, full=True) for position, block_id in enumerate((3, 1, 0))]
    backwards = 0
    for part in reversed(parts):
        backwards = add(backwards, part)
    assert backwards == blocks_digest(region, [3, 1, 0], 0, full=True)


@pytest.mark.parametrize("full", [True, False])
def test_a_block_in_anothers_place_changes_it(full: bool) -> None:
    region = Memory().region
    assert blocks_digest(region, [0, 1], 0, full=full) != blocks_digest(region, [1, 0], 0, full=full)
    assert blocks_digest(region, [0], 0, full=full) != blocks_digest(region, [0], 1, full=full)
    assert blocks_digest(region, [0], 0, full=full) != blocks_digest(Memory(layer=1).region, [0], 0, full=full)


@given(at=st.integers(0, 4095), flip=st.integers(1, 255))
def test_every_flipped_byte_changes_the_full_digest(at: int, flip: int) -> None:
    memory = Memory(num_blocks=1)
    before = block_digest(memory.region, 0, 0, full=True)
    memory.content[at] ^= flip
    assert block_digest(memory.region, 0, 0, full=True) != before


@pytest.mark.parametrize("half", [slice(0, 2048), slice(2048, 4096)])
def test_the_sampled_digest_sees_a_block_that_came_by_half(half: slice) -> None:
    memory = Memory(num_blocks=1)
    before = block_digest(memory.region, 0, 0, full=False)
    memory.content[half] = bytes(2048)
    assert block_digest(memory.region, 0, 0, full=False) != before


@given(position=st.integers(0, 1 << 20), layer=st.integers(0, 200), num_lines=st.integers(1, 70))
def test_the_sampled_lines_lie_inside_the_block(position: int, layer: int, num_lines: int) -> None:
    memory = Memory(block_bytes=num_lines * 64, num_blocks=3, layer=layer)
    before = block_digest(memory.region, 1, position, full=False)
    memory.content[: num_lines * 64] = bytes(num_lines * 64)
    memory.content[-num_lines * 64 :] = bytes(num_lines * 64)
    assert block_digest(memory.region, 1, position, full=False) == before


def test_bytes_and_memory_have_the_same_digest() -> None:
    memory = Memory(layer=7)
    assert block_digest(memory.region, 2, 5, full=True) == bytes_digest(memory.content[8192:12288], 7, 5)
