"""The yardstick: a plain memcpy of the same bytes in the same pieces, between memories like two KV caches.

    source  [ layer 0: block 0 .. n-1 ][ layer 1 ] ...          for each chunk of the prompt, for each layer:
    target  [ layer 0: block 0 .. n-1 ][ layer 1 ] ...             copy each block of the chunk, each to another place

Both memories are what the shm transport makes (a memfd, mapped shared, every page present) and as large as the KV
caches. Block numbers are drawn anew for each pass and on both sides, as in a pool that has been used for a while, so
nearly every block is a copy of its own. Three figures, because what the processor's caches hold decides a good part:

    cold: something much larger than the last-level cache has been written before, so that source and target come
          from memory;
    warm: each layer's source blocks are written immediately before their copy, as a layer's computation does;
    run:  cold, but each layer's blocks lie one behind the other on both sides: one copy per layer and chunk.
"""

from __future__ import annotations

import ctypes
import os
import random
import statistics

import msgspec

from core.clock import Clock
from transport.mapping import Mapping, make_memfd

PASSES = 3
BROOM_BYTES = 64 << 20


class CacheShape(msgspec.Struct, frozen=True):
    """A KV cache: block_bytes of one (layer, block), num_blocks of every layer."""

    num_layers: int
    block_bytes: int
    num_blocks: int

    @property
    def num_bytes(self) -> int:
        return self.num_layers * self.num_blocks * self.block_bytes


class CopyTimes(msgspec.Struct, frozen=True):
    """Median seconds of a few passes, and the bytes of one."""

    num_bytes: int
    cold_s: float
    warm_s: float
    run_s: float


class Yardstick:
    """Two memories of one shape, and a broom. Runs in the caller's thread, on whatever core that is bound to."""

    def __init__(self, shape: CacheShape, clock: Clock, last_level_bytes: int = 0, seed: int = 0) -> None:
        self._shape = shape
        self._clock = clock
        self._dice = random.Random(seed)
        self._memories = [memory_of(shape.num_bytes) for _ in range(2)]
        self._broom = memory_of(max(BROOM_BYTES, 4 * last_level_bytes))

    def measure(self, num_blocks: int, blocks_per_chunk: int) -> CopyTimes:
        """Copies `num_blocks` blocks of every layer, chunk by chunk; the first pass of each kind is not counted."""
        num_blocks = min(num_blocks, self._shape.num_blocks)
        chunks = [range(at, min(at + blocks_per_chunk, num_blocks)) for at in range(0, num_blocks, blocks_per_chunk)]
        cold, warm, run = [], [], []
        for _ in range(PASSES + 1):
            scattered = self._draw(num_blocks), self._draw(num_blocks)
            cold.append(self._pass(chunks, *scattered, warm=False))
            warm.append(self._pass(chunks, *scattered, warm=True))
            run.append(self._run(chunks))
        num_bytes = num_blocks * self._shape.num_layers * self._shape.block_bytes
        return CopyTimes(num_bytes, *(statistics.median(times[1:]) for times in (cold, warm, run)))

    def close(self) -> None:
        """Gives the memories back."""
        for memory in (*self._memories, self._broom):
            memory.close()

    def _draw(self, num_blocks: int) -> list[int]:
        return self._dice.sample(range(self._shape.num_blocks), num_blocks)

    def _pass(self, chunks: list[range], source_ids: list[int], target_ids: list[int], *, warm: bool) -> float:
        """Seconds spent copying; what prepares a copy is not counted."""
        self._sweep()
        source, target = self._memories
        seconds = 0.0
        for chunk in chunks:
            for layer in range(self._shape.num_layers):
                sources = [self._address(source, layer, source_ids[index]) for index in chunk]
                targets = [self._address(target, layer, target_ids[index]) for index in chunk]
                if warm:
                    for address in sources:
                        ctypes.memset(address, 1, self._shape.block_bytes)
                seconds += self._copy(sources, targets, self._shape.block_bytes)
        return seconds

    def _run(self, chunks: list[range]) -> float:
        self._sweep()
        source, target = self._memories
        seconds = 0.0
        for chunk in chunks:
            for layer in range(self._shape.num_layers):
                begin = self._address(source, layer, chunk.start), self._address(target, layer, chunk.start)
                seconds += self._copy([begin[0]], [begin[1]], len(chunk) * self._shape.block_bytes)
        return seconds

    def _copy(self, sources: list[int], targets: list[int], num_bytes: int) -> float:
        begun_s = self._clock.monotonic_s()
        for source, target in zip(sources, targets, strict=True):
            ctypes.memmove(target, source, num_bytes)
        return self._clock.monotonic_s() - begun_s

    def _address(self, memory: Mapping, layer: int, block_id: int) -> int:
        return memory.address + (layer * self._shape.num_blocks + block_id) * self._shape.block_bytes

    def _sweep(self) -> None:
        sweep(self._broom)


def sweep(broom: Mapping) -> None:
    """Writes the broom: afterwards the processor's caches hold little else."""
    ctypes.memset(broom.address, 2, broom.num_bytes)


def memory_of(num_bytes: int) -> Mapping:
    """Shared memory with every page present. The mapping keeps the memfd alive."""
    fd = make_memfd(num_bytes)
    try:
        memory = Mapping(fd, num_bytes)
    finally:
        os.close(fd)
    memory.populate()
    return memory
