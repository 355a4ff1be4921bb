"""A digest over blocks that both ends compute, whatever order the blocks travelled in.

    digest = sum over (layer, i) of xxh3_64(bytes of block i of that layer, seed = layer * 2^32 + i)   mod 2^64

i is the block's position in the hand-off, so a block that landed in another's place changes the sum. `full` hashes
every byte. `sampled` hashes four cache lines of every block (its first and last and two between, spread by position),
which catches a missed, misplaced or torn block at a hundredth of the cost, but not one flipped bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import xxhash

from transport.base import Region
from transport.regions import view

LINE_BYTES = 64
SAMPLED_LINES = 4
_MASK = (1 << 64) - 1


def block_digest(region: Region, block_id: int, position: int, *, full: bool) -> int:
    """The summand of one block: region gives its memory and layer number, position its place in the hand-off."""
    address = region.address + block_id * region.stride
    seed = (region.id << 32) | position
    if full or region.block_bytes <= SAMPLED_LINES * LINE_BYTES:
        return bytes_digest(view(address, region.block_bytes), region.id, position)
    lines = region.block_bytes // LINE_BYTES
    inner = 1 + (position * 7 + region.id * 3) % max(lines - 3, 1)
    picks = (0, inner, 1 + (inner + lines // 2) % max(lines - 2, 1), lines - 1)
    sample = b"".join(ctypes.string_at(address + line * LINE_BYTES, LINE_BYTES) for line in picks)
    return xxhash.xxh3_64_intdigest(sample, seed)


def bytes_digest(block: bytes | bytearray | memoryview, layer: int, position: int) -> int:
    """The summand of one whole block given as bytes."""
    return xxhash.xxh3_64_intdigest(block, (layer << 32) | position)


def blocks_digest(region: Region, block_ids: Sequence[int], first_position: int, *, full: bool) -> int:
    """The sum over consecutive positions of one region, modulo 2^64."""
    total = 0
    for offset, block_id in enumerate(block_ids):
        total += block_digest(region, block_id, first_position + offset, full=full)
    return total & _MASK


def add(left: int, right: int) -> int:
    """Sum of two digests."""
    return (left + right) & _MASK


def is_full(scheme: str, asked: bool) -> bool:
    """Whether a hand-off over this scheme is digested over every byte: always, where bytes cross a network."""
    return asked or scheme not in ("shm", "inproc")
