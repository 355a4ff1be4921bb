"""Registered memory, seen as spans: checks block lists against it.

Memory model: a `Span` is one byte range inside every block of a region. Nothing here owns memory; addresses are raw,
so every block list passes `resolve` before its addresses are used.
Threading: pure functions.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import operator
from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

import msgspec

from core.errors import TransferError
from transport.base import Blocks, Region

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


def check_region(region: Region, registered: Container[int] = ()) -> None:
    """Raises TransferError if the numbers cannot describe an array of blocks, or its id is registered already."""
    if region.id < 0 or region.block_bytes < 1 or region.num_blocks < 1 or region.stride < region.block_bytes:
        raise TransferError(f"not an array of blocks: {region}")
    if region.id in registered:
        raise TransferError(f"region {region.id} is registered already")


def resolve(regions: Mapping[int, Region], blocks: Blocks, whose: str) -> Span:
    """The span that `blocks` names. Raises TransferError if any of it lies outside the region."""
    region = regions.get(blocks.region)
    if region is None:
        raise TransferError(f"{whose} region {blocks.region} is not known")
    num_bytes = bytes_of_each(region.block_bytes, blocks.start, blocks.num_bytes)
    if num_bytes is None:
        raise TransferError(
            f"bytes {blocks.start}+{blocks.num_bytes} lie outside {whose} region {region.id}'s blocks of "
            f"{region.block_bytes}"
        )
    if not known_ids(blocks.ids).are_below(region.num_blocks):
        raise TransferError(f"block ids outside {whose} region {region.id} of {region.num_blocks} blocks")
    return Span(region, blocks.start, num_bytes)


def bytes_of_each(block_bytes: int, start: int, num_bytes: int) -> int | None:
    """How many bytes of each block a range of `Blocks` names; None if it lies outside."""
    result = num_bytes or block_bytes - start
    return None if start < 0 or result < 1 or start + result > block_bytes else result


class KnownIds(NamedTuple):
    """What a list of block ids is asked again and again: a hand-off writes the same ids once per layer."""

    least: int
    most: int
    may_have_run: bool

    def are_below(self, num_blocks: int) -> bool:
        """Whether a region of so many blocks has them all."""
        return self.least >= 0 and self.most < num_blocks


@functools.lru_cache(maxsize=32)
def known_ids(ids: tuple[int, ...]) -> KnownIds:
    """may_have_run: any id is one more than the one before it. Of no ids: 0, -1, no."""
    if not ids:
        return KnownIds(0, -1, False)
    return KnownIds(min(ids), max(ids), 1 in map(operator.sub, ids[1:], ids))


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
    return msgspec.structs.replace(region, address=region.address + start, block_bytes=num_bytes)


def is_run(ids: Sequence[int]) -> bool:
    """Whether the ids count up by one."""
    return all(right - left == 1 for left, right in itertools.pairwise(ids))


def view(address: int, num_bytes: int) -> memoryview:
    """Bytes at an address, without a copy. The caller keeps the memory alive."""
    return memoryview((ctypes.c_char * num_bytes).from_address(address)).cast("B")


@functools.lru_cache(maxsize=512)
def known_view(address: int, num_bytes: int) -> memoryview:
    """A view that is asked for again and again: of a whole region. It is of addresses, and keeps no memory alive."""
    return view(address, num_bytes)
