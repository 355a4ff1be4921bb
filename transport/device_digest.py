"""The digest of a hand-off's blocks in a device's memory, which the processor cannot read: the device adds it up.

    digest = sum over (layer, i) and the words w_j, of 8 bytes, of block i of that layer
             of mix(w_j xor (mix(layer * 2^32 + i) + (j + 1) * 0x9e3779b97f4a7c15))          modulo 2^64

i is the block's position in the hand-off, so a block in another's place changes the sum, as a word in another's does.
mix, the finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014), is
one-to-one, so one flipped bit always does. Threads add in any order. Every byte counts, always: a GPU reads its own
memory a hundred times faster than blocks travel. Not comparable with a digest of transport/digest.py, nor need it be:
memories of a host and of a GPU have different layouts.

Memory model: as transport/device.py. Threading: the engine's worker thread alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from transport.base import Region
from transport.device import Device, Lane, Tally
from transport.digest import BlockSum
from transport.regions import Span

_MASK = (1 << 64) - 1
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class DeviceSum:
    """See transport/digest.py: BlockSum."""

    def __init__(self, device: Device, tally: Tally) -> None:
        self._device = device
        self._tally = tally

    def add(self, region: Region, block_ids: Sequence[int], first_position: int, *, full: bool) -> None:
        """Adds blocks as they are once the computation given to the device until now is done; all of each."""
        span, seed = Span(region, 0, region.block_bytes), (region.id << 32) | first_position
        computed = self._device.mark()
        try:
            self._tally.add(span, block_ids, seed, computed)
        finally:
            computed.release()

    def value(self) -> int | None:
        return self._tally.value()

    def release(self) -> None:
        self._tally.release()


class DeviceDigests:
    """Begins sums; all of them share one lane."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._lane: Lane | None = None

    def begin(self) -> BlockSum:
        """A sum over nothing yet. Raises TransferError if the device refuses."""
        if self._lane is None:
            self._lane = self._device.lane()
        return DeviceSum(self._device, self._lane.tally())

    def close(self) -> None:
        """After the last sum."""
        if self._lane is not None:
            self._lane.close()


def words_sum(block: bytes | memoryview, seed: int) -> int:
    """What the device makes of one block, computed by the processor. seed: of the block, layer * 2^32 + position."""
    numpy: Any = importlib.import_module("numpy")
    words = numpy.frombuffer(block, numpy.uint64)
    with numpy.errstate(over="ignore"):
        keys = numpy.arange(1, len(words) + 1, dtype=numpy.uint64) * numpy.uint64(_GOLDEN) + numpy.uint64(mix(seed))
        mixed = words ^ keys
        mixed = (mixed ^ (mixed >> numpy.uint64(30))) * numpy.uint64(_FIRST)
        mixed = (mixed ^ (mixed >> numpy.uint64(27))) * numpy.uint64(_SECOND)
        return int((mixed ^ (mixed >> numpy.uint64(31))).sum(dtype=numpy.uint64))


def mix(word: int) -> int:
    """SplitMix64's finaliser."""
    word = ((word ^ (word >> 30)) * _FIRST) & _MASK
    word = ((word ^ (word >> 27)) * _SECOND) & _MASK
    return word ^ (word >> 31)
