"""Blocks between a device's memory and the arena, which is pinned for it: the device copies, the processor hashes.

    store:  layer 0 computed ─▶ copy ─▶ hash │ layer 1 computed ─▶ copy ─▶ hash │ ...   the step waits for the last
    load:   copy layer 0 │ copy layer 1 │ ...   behind each: hash of what lies in the arena, then compare

The copies run on lanes beside the computation (transport/device.py), one for stores and one for loads; threads
(kvcache/copiers.py) hash a layer's bytes in the arena as soon as it has been copied, either way, so that a slot to
which somebody else writes meanwhile differs. What a bus would change on the way is for its own checks.

A step's store is in the arena when the step ends: no block is given away while the device still reads it. A step
that stores nothing does not wait.

Memory model: every copy has ended when `end` and `read_all` return, unless the device has stood still for
DEVICE_WAIT_S: then the engine computes no more either. Threads: see kvcache/copies.py. Never run on a GPU yet.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, wait

from core.errors import TransferError
from kvcache.arena import MappedArena, add
from kvcache.copiers import Copiers
from kvcache.orders import Piece
from kvcache.wire import Written
from transport.base import Region
from transport.device import Device, Lane, Moment
from transport.faultpoint import FaultPoint
from transport.regions import Span

DEVICE_WAIT_S = 30.0
"""A device that takes longer for a copy has failed."""

_PAUSE_S = 0.0001


class _Layers:
    """The copies of some blocks' layers, and the digests of their bytes in the arena, layer by layer."""

    def __init__(
        self, arena: MappedArena, regions: Sequence[Region], pieces: Sequence[Piece], copiers: Copiers
    ) -> None:
        """Raises TransferError for a slot outside the arena."""
        self._arena = arena
        self._regions = regions
        self._pieces = pieces
        self._offsets = [piece.offset for piece in pieces]
        self._copiers = copiers
        self._block_ids = [piece.block_id for piece in pieces]
        self._slot_ids = [arena.slot_id(offset) for offset in self._offsets]
        self._hashed: list[Future[list[int]]] = []

    def store(self, lane: Lane, layer: int, computed: Moment) -> None:
        """Raises TransferError if the device refuses."""
        source, target = _whole(self._regions[layer]), self._arena.slots(layer)
        self._hash(layer, lane.copy(source, self._block_ids, target, self._slot_ids, computed))

    def load(self, lane: Lane, layer: int, ordered: Moment) -> None:
        """Raises TransferError if the device refuses."""
        source, target = self._arena.slots(layer), _whole(self._regions[layer])
        self._hash(layer, lane.copy(source, self._slot_ids, target, self._block_ids, ordered))

    def digests(self) -> list[int]:
        """Of every piece, over all layers, the key's summand among them; waits for all of them. Raises TransferError if
        the device has failed; every copy has ended then, too."""
        wait(self._hashed)
        totals = [self._arena.first_summand(piece.key) for piece in self._pieces]
        for hashed in self._hashed:
            totals = [add(*each) for each in zip(totals, hashed.result(), strict=True)]
        return totals

    def _hash(self, layer: int, copied: Moment) -> None:
        self._hashed.append(self._copiers.submit(self._summands, layer, copied))

    def _summands(self, layer: int, copied: Moment) -> list[int]:
        try:
            _wait_for(copied)
        finally:
            copied.release()
        return self._arena.summands_in_slots(layer, self._offsets)


class DeviceReads:
    """See kvcache/copies.py: Reads."""

    def __init__(self, device: Device, regions: Sequence[Region], copiers: Copiers, faults: FaultPoint) -> None:
        self._device = device
        self._regions = regions
        self._copiers = copiers
        self._faults = faults
        self._lane: Lane | None = None

    def mark(self) -> Moment:
        return self._device.mark()

    def read_all(self, arena: MappedArena, pieces: Sequence[Piece], ordered: Moment | None) -> list[Written]:
        assert ordered is not None
        totals = self._load(_Layers(arena, self._regions, pieces, self._copiers), ordered)
        return [
            Written(piece.key, piece.offset, piece.digest)
            for piece, total in zip(pieces, totals, strict=True)
            if not arena.is_sound(piece.offset, piece.digest, total)
        ]

    def close(self) -> None:
        if self._lane is not None:
            self._lane.close()

    def _load(self, layers: _Layers, ordered: Moment) -> list[int]:
        """The digests; every copy that was begun has ended, also where one is refused."""
        try:
            if self._lane is None:
                self._lane = self._device.lane()
            for layer in range(len(self._regions)):
                self._faults.reach("load", layer=layer)
                layers.load(self._lane, layer, ordered)
        finally:
            totals = layers.digests()
        return totals


class DeviceWriting:
    """See kvcache/copies.py: Writing."""

    def __init__(self, device: Device, lane: Lane, layers: _Layers) -> None:
        self._device = device
        self._lane = lane
        self._layers = layers

    def copy(self, layer: int) -> None:
        computed = self._device.mark()
        try:
            self._layers.store(self._lane, layer, computed)
        finally:
            computed.release()

    def end(self) -> list[int]:
        return self._layers.digests()


class DeviceWrites:
    """See kvcache/copies.py: Writes."""

    def __init__(self, device: Device, regions: Sequence[Region]) -> None:
        self._device = device
        self._regions = regions
        self._hasher = Copiers(1)  # of its own: it waits for the computation, for which no load is to wait
        self._lane: Lane | None = None

    def begin(self, arena: MappedArena, pieces: Sequence[Piece]) -> DeviceWriting:
        """Raises TransferError if the device refuses, or for a slot outside the arena."""
        if self._lane is None:
            self._lane = self._device.lane()
        return DeviceWriting(self._device, self._lane, _Layers(arena, self._regions, pieces, self._hasher))

    def close(self) -> None:
        self._hasher.close()
        if self._lane is not None:
            self._lane.close()


def _whole(region: Region) -> Span:
    return Span(region, 0, region.block_bytes)


def _wait_for(moment: Moment) -> None:
    """Raises TransferError if the device fails or stands still."""
    deadline_s = time.monotonic() + DEVICE_WAIT_S
    while not moment.has_passed():
        if time.monotonic() > deadline_s:
            raise TransferError(f"the device has not copied within {DEVICE_WAIT_S:.0f} s")
        time.sleep(_PAUSE_S)
