"""Registered memory, seen as spans: checks block lists against it and copies between two of them.

Memory model: a `Span` is one byte range inside every block of a region. Nothing here owns memory; addresses are raw,
so every block list passes `resolve` before its addresses are used.
Threading: pure functions; large pieces are copied outside the interpreter lock (ctypes releases it).
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from core.errors import TransferError
from transport.base import Blocks, Region

MAX_TAG_CHARACTERS = 1024
MAX_NOTICE_BYTES = 16 << 10

LARGEST_ASSIGNED_BYTES = 32 << 10
FEWEST_ASSIGNED = 4


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


def is_run(ids: Sequence[int]) -> bool:
    """Whether the ids count up by one."""
    return all(right - left == 1 for left, right in itertools.pairwise(ids))


def copy_pairs(source: Span, source_ids: Sequence[int], target: Span, target_ids: Sequence[int]) -> None:
    """Copies block by block, or run by run where both sides are dense and consecutive.

    Many small pieces are assigned between two views, which costs half of a foreign call per piece; large ones are
    copied by foreign calls, outside the interpreter lock.
    """
    if len(source_ids) != len(target_ids):
        raise ValueError(f"{len(source_ids)} pieces cannot be copied to {len(target_ids)} places")
    if not source_ids:
        return
    size = source.num_bytes
    cuts = _cuts(source_ids, target_ids) if source.is_dense() and target.is_dense() else range(1, len(source_ids))
    from_stride, to_stride = source.region.stride, target.region.stride
    if size > LARGEST_ASSIGNED_BYTES or len(cuts) < FEWEST_ASSIGNED:
        from_start, to_start = source.address(0), target.address(0)
        first = 0
        for end in (*cuts, len(source_ids)):
            from_address = from_start + source_ids[first] * from_stride
            ctypes.memmove(to_start + target_ids[first] * to_stride, from_address, (end - first) * size)
            first = end
        return
    from_bytes, to_bytes = _all_bytes(source), _all_bytes(target)
    first = 0
    for end in (*cuts, len(source_ids)):
        from_at, to_at, num_bytes = source_ids[first] * from_stride, target_ids[first] * to_stride, (end - first) * size
        to_bytes[to_at : to_at + num_bytes] = from_bytes[from_at : from_at + num_bytes]
        first = end


def _cuts(source_ids: Sequence[int], target_ids: Sequence[int]) -> list[int]:
    """Where a new run begins, the first one not counted."""
    pairs = list(zip(source_ids, target_ids, strict=True))
    following = itertools.pairwise(pairs)
    return [at for at, ((a, b), (c, d)) in enumerate(following, 1) if c != a + 1 or d != b + 1]


def _all_bytes(span: Span) -> memoryview:
    """From the span in the first block to its end in the last one."""
    region = span.region
    return view(span.address(0), (region.num_blocks - 1) * region.stride + span.num_bytes)


def view(address: int, num_bytes: int) -> memoryview:
    """Bytes at an address, without a copy. The caller keeps the memory alive."""
    return memoryview((ctypes.c_char * num_bytes).from_address(address)).cast("B")
