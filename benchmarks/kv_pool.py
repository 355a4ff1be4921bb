"""A KV cache without an engine: equally large pieces of every layer in one memory, and a walk over its blocks.

    memory  [ layer 0: piece 0 .. n-1 ][ layer 1: piece 0 .. n-1 ] ...

A walk hands out block numbers in a random order that it keeps: no block comes back before every other block of the
pool was used, so what a sample touches left the processor's caches long ago, if the pool is larger than they are.

Memory model: a pool is numbers only; the memory belongs to whoever mapped it. Threading: pure; a walk has one owner.
"""

from __future__ import annotations

import ctypes
import random

import msgspec

from transport.base import Region
from transport.mapping import Mapping

_PATTERN_BYTES = (1 << 20) + 61
"""Not a multiple of any block, so that no two pieces are equal."""


class PoolShape(msgspec.Struct, frozen=True):
    """piece_bytes: of one block in one layer."""

    num_layers: int
    piece_bytes: int
    num_blocks: int

    @property
    def num_bytes(self) -> int:
        return self.num_layers * self.piece_bytes * self.num_blocks

    def block_bytes(self) -> int:
        """Of one block in all layers."""
        return self.num_layers * self.piece_bytes


class Pool(msgspec.Struct, frozen=True):
    """A shape at an address of this process."""

    shape: PoolShape
    address: int

    def address_of(self, layer: int, block_id: int) -> int:
        """Of one piece."""
        return self.address + (layer * self.shape.num_blocks + block_id) * self.shape.piece_bytes

    def regions(self) -> list[Region]:
        """One per layer, as a transport knows them."""
        size, count = self.shape.piece_bytes, self.shape.num_blocks
        return [Region(layer, self.address_of(layer, 0), size, size, count) for layer in range(self.shape.num_layers)]


class Walk:
    """Block numbers, each again only after all others."""

    def __init__(self, num_blocks: int, seed: int) -> None:
        self._order = list(range(num_blocks))
        random.Random(seed).shuffle(self._order)
        self._at = 0

    def take(self, count: int) -> tuple[int, ...]:
        """The next ones; at most as many as there are."""
        taken = [self._order[(self._at + index) % len(self._order)] for index in range(count)]
        self._at = (self._at + count) % len(self._order)
        return tuple(taken)


def fill(memory: Mapping, seed: int) -> None:
    """Random bytes, a megabyte of them over and over."""
    pattern = random.Random(seed).randbytes(_PATTERN_BYTES)
    for at in range(0, memory.num_bytes, _PATTERN_BYTES):
        ctypes.memmove(memory.address + at, pattern, min(_PATTERN_BYTES, memory.num_bytes - at))
