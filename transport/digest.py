"""A digest over blocks that both ends compute, whatever order the blocks travelled in.

    digest = sum over (layer, i) of xxh3_64(bytes of block i of that layer, seed = layer * 2^32 + i)   mod 2^64

i is the block's position in the hand-off, so a block that landed in another's place changes the sum. `full` hashes
every byte. `sampled` hashes four cache lines of every block (its first and last and two between, spread by position),
which catches a missed, misplaced or torn block at a tenth of the cost, but not one flipped bit. A region whose address
or stride is no multiple of 8 is hashed whole.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from transport.base import Region
from transport.regions import view

LINE_BYTES = 64
SAMPLED_LINES = 4
_MASK = (1 << 64) - 1


def block_digest(region: Region, block_id: int, position: int, *, full: bool) -> int:
    """The summand of one block: region gives its memory and layer number, position its place in the hand-off."""
    return blocks_digest(region, [block_id], position, full=full)


def bytes_digest(block: bytes | bytearray | memoryview, layer: int, position: int) -> int:
    """The summand of one whole block given as bytes."""
    return xxhash.xxh3_64_intdigest(block, (layer << 32) | position)


def blocks_digest(region: Region, block_ids: Sequence[int], first_position: int, *, full: bool) -> int:
    """The sum over consecutive positions of one region, modulo 2^64."""
    places = list(enumerate(block_ids, first_position))
    if full or region.block_bytes <= SAMPLED_LINES * LINE_BYTES or region.stride % 8 or region.address % 8:
        addresses = ((position, region.address + block_id * region.stride) for position, block_id in places)
        summands = (bytes_digest(view(at, region.block_bytes), region.id, position) for position, at in addresses)
        return sum(summands) & _MASK
    samples = _samples(region, np.asarray(block_ids, np.int64), first_position).tobytes()
    size, seed = SAMPLED_LINES * LINE_BYTES, (region.id << 32) | first_position
    pieces = (samples[index * size : (index + 1) * size] for index in range(len(places)))
    return sum(xxhash.xxh3_64_intdigest(piece, seed + index) for index, piece in enumerate(pieces)) & _MASK


def _samples(region: Region, block_ids: npt.NDArray[np.int64], first_position: int) -> npt.NDArray[np.uint64]:
    """Of each block its SAMPLED_LINES cache lines as words: shape [blocks, lines, 8].

    Gathered for all blocks at once: one by one, the interpreter would cost more than hashing every byte.
    """
    lines = region.block_bytes // LINE_BYTES
    positions = np.arange(first_position, first_position + len(block_ids))
    inner = 1 + (positions * 7 + region.id * 3) % max(lines - 3, 1)
    second = 1 + (inner + lines // 2) % max(lines - 2, 1)
    picks = np.stack([np.zeros_like(inner), inner, second, np.full_like(inner, lines - 1)], axis=1)
    first_words = block_ids * (region.stride // 8)
    index = first_words[:, None, None] + picks[:, :, None] * 8 + np.arange(8)
    gathered: npt.NDArray[np.uint64] = _words(region)[index]
    return gathered


@functools.lru_cache(maxsize=1024)
def _words(region: Region) -> npt.NDArray[np.uint64]:
    """The region's memory as words. Owns nothing: read only while the region is registered."""
    num_bytes = (region.num_blocks - 1) * region.stride + region.block_bytes
    words: Any = (ctypes.c_uint64 * (num_bytes // 8)).from_address(region.address)
    return np.frombuffer(words, np.uint64)


def add(left: int, right: int) -> int:
    """Sum of two digests."""
    return (left + right) & _MASK


def is_full(scheme: str, asked: bool) -> bool:
    """Whether a hand-off over this scheme is digested over every byte: always, where bytes cross a network."""
    return asked or scheme not in ("shm", "inproc")
