"""Copies between block lists: every pair in its place, whatever runs the ids form and however large a piece is."""

from __future__ import annotations

import ctypes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import TransferError
from transport.base import Blocks, Region
from transport.regions import FEWEST_ASSIGNED, LARGEST_ASSIGNED_BYTES, Span, copy_pairs, resolve

NUM_BLOCKS = 12
ids = st.lists(st.integers(0, NUM_BLOCKS - 1), unique=True, max_size=NUM_BLOCKS)


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


@pytest.mark.parametrize("count", [1, FEWEST_ASSIGNED])
def test_unequal_lists_are_copied_not_even_in_part(count: int) -> None:
    memory = ctypes.create_string_buffer(b"ab" * NUM_BLOCKS)
    span = Span(Region(0, ctypes.addressof(memory), 2, 2, NUM_BLOCKS), 0, 2)
    before = memory.raw
    with pytest.raises(ValueError, match="cannot be copied"):
        copy_pairs(span, range(count), span, range(2, count + 3))
    assert memory.raw == before


@pytest.mark.parametrize("wrong", [(-1, 2), (3, 12), (5, 1 << 40)])
def test_ids_outside_the_region_are_refused_also_when_asked_again(wrong: tuple[int, int]) -> None:
    region = Region(0, 4096, 8, 8, NUM_BLOCKS)
    for _ in range(2):
        with pytest.raises(TransferError, match="outside own region 0 of 12 blocks"):
            resolve({0: region}, Blocks(0, wrong), "own")
    assert resolve({0: region}, Blocks(0, ()), "own").num_bytes == 8
