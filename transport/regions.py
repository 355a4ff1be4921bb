"""Registered memory, seen as spans: checks block lists against it and copies between two of them.

Memory model: a `Span` is one byte range inside every block of a region. Nothing here owns memory; addresses are raw,
so every block list passes `resolve` before its addresses are used.
Threading: pure functions; the copy runs outside the interpreter lock (ctypes releases it).
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from core.errors import TransferError
from transport.base import Blocks, Region
from transport.runs import runs

MAX_TAG_CHARACTERS = 1024
MAX_NOTICE_BYTES = 16 << 10


class Span(NamedTuple):
    """`num_bytes` bytes from `start` inside each block of a region."""

    region: Region
    start: int
    num_bytes: int

    def address(self, block_id: int) -> int:
        """Where the span lies inside one block."""
        return self.region.address + block_id * self.region.stride + self.start

    def is_dense(self) -> bool:
        """Whether consecutive blocks are consecutive bytes."""
        return self.num_bytes == self.region.stride


def check_region(region: Region) -> None:
    """Raises TransferError if the numbers cannot describe an array of blocks."""
    if region.id < 0 or region.block_bytes < 1 or region.num_blocks < 1 or region.stride < region.block_bytes:
        raise TransferError(f"not an array of blocks: {region}")


def resolve(regions: Mapping[int, Region], blocks: Blocks, whose: str) -> Span:
    """The span that `blocks` names. Raises TransferError if any of it lies outside the region."""
    region = regions.get(blocks.region)
    if region is None:
        raise TransferError(f"{whose} region {blocks.region} is not known")
    num_bytes = blocks.num_bytes or region.block_bytes - blocks.start
    if blocks.start < 0 or num_bytes < 1 or blocks.start + num_bytes > region.block_bytes:
        raise TransferError(
            f"bytes {blocks.start}+{num_bytes} lie outside {whose} region {region.id}'s blocks of {region.block_bytes}"
        )
    if blocks.ids and (min(blocks.ids) < 0 or max(blocks.ids) >= region.num_blocks):
        raise TransferError(f"block ids outside {whose} region {region.id} of {region.num_blocks} blocks")
    return Span(region, blocks.start, num_bytes)


def check_pairing(local: Blocks, local_span: Span, remote: Blocks, remote_span: Span) -> None:
    """Raises TransferError unless both sides name equally many, equally large pieces."""
    if len(local.ids) != len(remote.ids):
        raise TransferError(f"{len(local.ids)} local blocks cannot be paired with {len(remote.ids)} remote ones")
    if local_span.num_bytes != remote_span.num_bytes:
        raise TransferError(f"pieces of {local_span.num_bytes} local and {remote_span.num_bytes} remote bytes differ")


def check_words(tag: str, notice: bytes | None) -> None:
    """Raises TransferError if a tag or notice is larger than any receiver would take."""
    if len(tag) > MAX_TAG_CHARACTERS:
        raise TransferError(f"a tag of {len(tag)} characters is longer than {MAX_TAG_CHARACTERS}")
    if notice is not None and len(notice) > MAX_NOTICE_BYTES:
        raise TransferError(f"a notice of {len(notice)} bytes is larger than {MAX_NOTICE_BYTES}")


def part_of(region: Region, start: int, num_bytes: int) -> Region:
    """A byte range of every block of a region, as a region with the same blocks."""
    return Region(region.id, region.address + start, num_bytes, region.stride, region.num_blocks)


def is_run(ids: Sequence[int]) -> bool:
    """Whether the ids count up by one."""
    return all(right - left == 1 for left, right in itertools.pairwise(ids))


def copy_pairs(source: Span, source_ids: Sequence[int], target: Span, target_ids: Sequence[int]) -> None:
    """Copies block by block, or run by run where both sides are dense and consecutive."""
    if not (source.is_dense() and target.is_dense()):
        for source_id, target_id in zip(source_ids, target_ids, strict=True):
            ctypes.memmove(target.address(target_id), source.address(source_id), source.num_bytes)
        return
    for run in runs(source_ids, target_ids):
        ctypes.memmove(target.address(run.target), source.address(run.source), run.num_blocks * source.num_bytes)


def view(address: int, num_bytes: int) -> memoryview:
    """Bytes at an address, without a copy. The caller keeps the memory alive."""
    return memoryview((ctypes.c_char * num_bytes).from_address(address)).cast("B")
