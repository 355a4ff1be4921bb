"""One process's view of the arena: maps it, copies whole blocks in and out layer by layer, and takes their digest.

    slot of one block:   layer 0 ┃ layer 1 ┃ ... ┃ layer L-1        each `block_bytes` of its region, one after another
    of several ranks:    rank 0's layers ┃ rank 1's layers ┃ ... ┃ digest of each rank's part

    digest = xxh3(key) + sum over layers of xxh3(bytes of the layer, seed = layer + 1)   modulo 2^64

So layers may be copied and hashed in any order, right where their bytes are in the processor's cache, and a block that
lies under another's key differs. Every byte counts. Tensor-parallel ranks keep different heads of a block, and each
copies its own part; for the digest rank r's layer l is layer r * L + l. A rank that reads sees its own part alone: it
must be the one in the slot's table, and the table must add up to the digest of the whole block.

Memory model: a mapping holds the arena's memory, also after its server and every other process have gone. Slots are raw
addresses: each is checked against the arena's size. Where an engine's blocks lie in a GPU's memory the mapping is
pinned, and the GPU copies (kvcache/device_copies.py).
Threading: `map` waits for the server and for pages, so the loading thread calls it; `get` and the copies are for any
thread. Copies and digests run outside the interpreter lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import os
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import xxhash

from core.errors import TransferError
from kvcache.keys import BlockKey
from kvcache.pinned import Pinned
from kvcache.ranges import ALIGNMENT
from transport.base import Region
from transport.device import Device
from transport.mapping import Mapping, map_foreign
from transport.regions import Span, view

_MASK = (1 << 64) - 1
_ENTRY = struct.Struct("<Q")
_log = logging.getLogger(__name__)


class Share(NamedTuple):
    """Whose part of every block a process copies: that of one of so many tensor-parallel ranks."""

    rank: int = 0
    num_ranks: int = 1


WHOLE = Share()
"""Of an instance of one rank."""


def slot_bytes(part_bytes: int, num_ranks: int) -> int:
    """Of one block over all layers and ranks; part_bytes: of one rank."""
    return part_bytes * num_ranks + (_ENTRY.size * num_ranks if num_ranks > 1 else 0)


class MappedArena:
    """One arena in this process, and the engine's regions beside it, one per layer in layer order.

    Hold it while copying: the memory is unmapped with the last reference.
    """

    def __init__(
        self, mapping: Mapping, regions: Sequence[Region], share: Share = WHOLE, pinned: Pinned | None = None
    ) -> None:
        """pinned: the mapping, where the regions lie in a device's memory."""
        self._mapping = mapping
        self._pinned = pinned
        self._regions = regions
        self._share = share
        self._layer_offsets = list(itertools.accumulate((r.block_bytes for r in regions), initial=0))
        self.part_bytes = self._layer_offsets[-1]
        """Of one block over all layers, on this rank."""

        self._first_seed = share.rank * len(regions) + 1

    @property
    def block_bytes(self) -> int:
        """Of one block over all layers and ranks."""
        return slot_bytes(self.part_bytes, self._share.num_ranks)

    def first_summand(self, key: BlockKey) -> int:
        """With which this rank's part of a block's digest begins."""
        return 0 if self._share.rank else key_summand(key)

    def write_layer(self, layer: int, block_id: int, offset: int) -> int:
        """Copies one layer of a block into its slot; returns the summand of the digest of what arrived there. Raises
        TransferError for a slot outside the arena."""
        region = self._regions[layer]
        source = region.address + block_id * region.stride
        target = self._part_at(offset) + self._layer_offsets[layer]
        ctypes.memmove(target, source, region.block_bytes)  # first: 0.77 of a memcpy's speed, hashed first 0.73
        return xxhash.xxh3_64_intdigest(view(target, region.block_bytes), seed=self._first_seed + layer)

    def seal(self, offset: int, part_digest: int) -> None:
        """Every layer of a block is in its slot: says so to the ranks that read it. Raises TransferError for a slot
        outside the arena."""
        if self._share.num_ranks > 1:
            _ENTRY.pack_into(self._table(offset), self._share.rank * _ENTRY.size, part_digest)

    def read_block(self, block_id: int, offset: int, key: BlockKey, digest: int) -> bool:
        """Copies this rank's part of a slot into a block of the engine. False if what has arrived there is not of the
        block with this key and digest. Raises TransferError for a slot outside the arena."""
        total: int = self.first_summand(key)
        at = self._part_at(offset)  # a sum of `read_layer` takes 3 % longer with layers of 128 KiB, 18 % with 8 KiB
        for seed, region in enumerate(self._regions, self._first_seed):
            target = region.address + block_id * region.stride
            ctypes.memmove(target, at, region.block_bytes)
            total += xxhash.xxh3_64_intdigest(view(target, region.block_bytes), seed=seed)
            at += region.block_bytes
        return self.is_sound(offset, digest, total)

    def read_layer(self, layer: int, block_id: int, offset: int) -> int:
        """Copies one layer of this rank's part of a slot into a block of the engine; returns the summand of the digest
        of what arrived there. Raises TransferError for a slot outside the arena."""
        region = self._regions[layer]
        target = region.address + block_id * region.stride
        ctypes.memmove(target, self._part_at(offset) + self._layer_offsets[layer], region.block_bytes)
        return xxhash.xxh3_64_intdigest(view(target, region.block_bytes), seed=self._first_seed + layer)

    def slots(self, layer: int) -> Span:
        """Where one layer of this rank's part lies in every slot, as the device sees the pinned memory. Slots may begin
        at every multiple of ALIGNMENT: the block ids are those of `slot_id`."""
        assert self._pinned is not None, "no device copies from memory that is not pinned"
        num_slots = self._mapping.num_bytes // ALIGNMENT
        places = Region(layer, self._pinned.address, ALIGNMENT, ALIGNMENT, num_slots)
        start = self._share.rank * self.part_bytes + self._layer_offsets[layer]
        return Span(places, start, self._regions[layer].block_bytes)

    def slot_id(self, offset: int) -> int:
        """Of a slot, for `slots`. Raises TransferError for one outside the arena, or that begins elsewhere."""
        self._at(offset)
        number, rest = divmod(offset, ALIGNMENT)
        if rest:
            raise TransferError(f"a block at {offset} does not begin at a multiple of {ALIGNMENT}")
        return number

    def summands_in_slots(self, layer: int, offsets: Sequence[int]) -> list[int]:
        """The summands of the digests of one layer as it lies in slots. Raises TransferError for one outside the arena.

        One view for all: with blocks of 8 KiB a view for each takes ten times as long as its hash."""
        for offset in (min(offsets), max(offsets)):
            self._at(offset)
        memory, size = view(self._mapping.address, self._mapping.num_bytes), self._regions[layer].block_bytes
        first = self._share.rank * self.part_bytes + self._layer_offsets[layer]
        seed, digest = self._first_seed + layer, xxhash.xxh3_64_intdigest
        return [digest(memory[first + at : first + at + size], seed=seed) for at in offsets]

    def is_sound(self, offset: int, digest: int, total: int) -> bool:
        """Whether this rank's part of a slot, whose summands add up to `total` (first_summand among them), is of the
        block with this digest. Raises TransferError for a slot outside the arena."""
        if self._share.num_ranks == 1:
            return total & _MASK == digest
        parts = [part for (part,) in _ENTRY.iter_unpack(self._table(offset))]
        return bool(parts[self._share.rank] == total & _MASK and sum(parts) & _MASK == digest)

    def close(self) -> None:
        """Lets go of the device. Nothing is being copied."""
        if self._pinned is not None:
            self._pinned.unpin()

    def _part_at(self, offset: int) -> int:
        return self._at(offset) + self._share.rank * self.part_bytes

    def _table(self, offset: int) -> memoryview:
        at = self._at(offset) + self._share.num_ranks * self.part_bytes
        return view(at, self._share.num_ranks * _ENTRY.size)

    def _at(self, offset: int) -> int:
        if offset < 0 or offset + self.block_bytes > self._mapping.num_bytes:
            raise TransferError(f"a block at {offset} lies outside the arena of {self._mapping.num_bytes} bytes")
        return self._mapping.address + offset


class Arena:
    """The arena that is served now. `fetch` gives its (descriptor, size, id) and may wait (client.fetch_arena).
    device: in whose memory the regions lie; None: in the host's."""

    def __init__(
        self,
        regions: Sequence[Region],
        fetch: Callable[[], tuple[int, int, str]],
        share: Share = WHOLE,
        device: Device | None = None,
    ) -> None:
        self._regions = regions
        self._fetch = fetch
        self._share = share
        self._device = device
        self._refused = "", ""
        self._current: tuple[str, MappedArena] | None = None

    def get(self, arena_id: str) -> MappedArena | None:
        """The arena of this id if it is mapped already; never waits."""
        current = self._current
        return current[1] if current is not None and current[0] == arena_id else None

    def map(self, arena_id: str = "") -> MappedArena:
        """The arena of this id (of any, if empty), mapped now if it was not. Raises TransferError if another one is
        served, or none, or if it cannot be pinned."""
        known = self.get(arena_id)
        if known is not None:
            return known
        if arena_id and arena_id == self._refused[0]:
            raise TransferError(self._refused[1])
        fd, num_bytes, served = self._fetch()
        try:
            if arena_id and served != arena_id:
                raise TransferError("another arena is served by now")
            mapping = map_foreign(fd, num_bytes)
        finally:
            os.close(fd)
        if self._device is not None:
            return self._pin(served, mapping, self._device)
        mapped = MappedArena(mapping, self._regions, self._share)
        self._current = served, mapped
        with contextlib.suppress(TransferError):  # where memory is short, pages come when they are touched
            mapping.populate()
        return mapped

    def close(self) -> None:
        """Nothing is being copied any more."""
        current, self._current = self._current, None
        if current is not None:
            current[1].close()

    def _pin(self, served: str, mapping: Mapping, device: Device) -> MappedArena:
        """Tried once for each arena: it takes long, and does not become possible by waiting."""
        try:
            mapped = MappedArena(mapping, self._regions, self._share, Pinned(device, mapping))
        except TransferError as error:
            self._refused = served, str(error)
            _log.warning("the KV cache of this host cannot be used: %s", error)
            raise
        self._current = served, mapped
        return mapped


def block_digest(key: BlockKey, block: memoryview, num_layers: int) -> int:
    """The digest of a whole block of layers of one size. Raises ValueError if it is no whole number of them."""
    layer_bytes, rest = divmod(len(block), num_layers)
    if rest:
        raise ValueError(f"{len(block)} bytes are no {num_layers} layers")
    total = key_summand(key)
    for layer in range(num_layers):
        total += xxhash.xxh3_64_intdigest(block[layer * layer_bytes : (layer + 1) * layer_bytes], seed=layer + 1)
    return total & _MASK


def key_summand(key: BlockKey) -> int:
    """What binds a block's digest to its key."""
    return xxhash.xxh3_64_intdigest(key)


def add(left: int, right: int) -> int:
    """Sum of two digests."""
    return (left + right) & _MASK
