"""Who may use which bytes of an arena: blocks by key, from reservation to eviction.

    reserve ──▶ RESERVED ── commit ──▶ READY ── search pins, release unpins ──▶ evicted, least recently used first
                   └─ abandon, deadline, owner gone ──▶ COOLING ──▶ free        (a late writer may still be copying)

Only READY blocks are found. A pin keeps a block's bytes until it is released, its deadline passes or its owner is
gone; the reader compares the digest after its copy all the same, so a lost pin costs a miss and never a wrong byte.

Memory model: offsets into an arena that is mapped by others; nothing here reads or writes it.
Threading: the server's thread only. Every duration is in seconds of the clock that is passed in.
"""

from __future__ import annotations

import enum
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from core.clock import Clock
from kvcache.keys import BlockKey
from kvcache.ledger import Ledger, Line
from kvcache.ranges import Ranges, aligned

RESERVATION_S = 120.0
"""How long a writer may take from reservation to commit: a long prompt's prefill."""

LEASE_S = 30.0
"""How long a reader may take from the answer to the end of its copy."""

COOLING_S = 1.0
"""A dead engine's worker outlives its scheduler by less than this; its last copy may still be under way."""

RESERVED_SHARE = 0.5
"""Of the arena, for blocks that are not complete."""

MAX_EVICTIONS = 64
"""For one new block: among blocks of several sizes no gap may fit, and the cache must not be emptied to find one."""


SERVER = 0
"""The owner of places that the server itself fills from other tiers: without a deadline, since it knows their end."""


class State(enum.Enum):
    """Of one block's bytes."""

    RESERVED = "reserved"
    READY = "ready"
    COOLING = "cooling"


@dataclass(slots=True)
class Entry:
    """One block's bytes. `deadline_s`: of the reservation, or the end of cooling."""

    key: BlockKey
    offset: int
    num_bytes: int
    owner: int
    state: State
    deadline_s: float
    digest: int = 0
    pins: int = 0


@dataclass
class Lease:
    """What one search pinned."""

    entries: list[Entry]
    deadline_s: float


@dataclass
class Counts:
    """Since the server started, in blocks."""

    searched: int = 0
    found: int = 0
    committed: int = 0
    evicted: int = 0
    refused: int = 0
    quarantined: int = 0
    expired: int = 0
    taken_over: int = 0


@dataclass
class _Usage:
    """Bytes by state."""

    reserved: int = 0
    ready: int = 0
    cooling: int = 0


class Index:
    """The blocks of one arena of `capacity_bytes`. Takes over what the ledger still knows. `on_change` is told of each
    block that can be found from now on, and of each that cannot any more."""

    def __init__(self, capacity_bytes: int, ledger: Ledger, clock: Clock) -> None:
        self.capacity_bytes = capacity_bytes
        self.counts = Counts()
        self.usage = _Usage()
        self._ledger = ledger
        self._clock = clock
        self._ranges = Ranges(capacity_bytes)
        self._reserved: dict[BlockKey, Entry] = {}
        self._ready: OrderedDict[BlockKey, Entry] = OrderedDict()
        self._cooling: list[Entry] = []
        self._leases: dict[tuple[int, int], Lease] = {}
        self.on_change: Callable[[BlockKey, bool], None] = lambda key, is_there: None
        for line in ledger.lines():
            self._take_over(line)

    def __len__(self) -> int:
        return len(self._ready)

    def keys(self) -> list[BlockKey]:
        """Complete blocks, the next to be evicted first."""
        return list(self._ready)

    def get(self, key: BlockKey) -> Entry | None:
        """A complete block, without pinning it."""
        return self._ready.get(key)

    def search(self, owner: int, lease: int, keys: Sequence[BlockKey]) -> list[Entry]:
        """The complete blocks of the longest prefix of `keys`, pinned until `release(owner, lease)`."""
        found: list[Entry] = []
        for key in keys:
            entry = self._ready.get(key)
            if entry is None:
                break
            found.append(entry)
        self.touch([entry.key for entry in found])
        self.release(owner, lease)
        if found:
            for entry in found:
                entry.pins += 1
            self._leases[owner, lease] = Lease(found, self._clock.monotonic_s() + LEASE_S)
        return found

    def release(self, owner: int, lease: int) -> None:
        """Ends the pins of one search; one that is not known (any more) is passed over."""
        held = self._leases.pop((owner, lease), None)
        for entry in held.entries if held else ():
            entry.pins -= 1

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """A chain of blocks was used: its end is evicted before its beginning, which others may share."""
        for key in reversed(keys):
            if key in self._ready:
                self._ready.move_to_end(key)

    def reserve(self, owner: int, keys: Sequence[BlockKey], num_bytes: int) -> list[tuple[int, int]]:
        """(index into keys, offset) of blocks that `owner` may write now.

        Keys that somebody has written or is writing are left out. Stops at the first block that finds no room: what
        follows it could not be found without it.
        """
        granted = []
        size = aligned(num_bytes)
        for index, key in enumerate(keys):
            if key in self._ready or key in self._reserved:
                continue
            offset = self._make_room(size)
            if offset is None:
                self.counts.refused += len(keys) - index
                break
            deadline_s = math.inf if owner == SERVER else self._clock.monotonic_s() + RESERVATION_S
            self._reserved[key] = Entry(key, offset, num_bytes, owner, State.RESERVED, deadline_s)
            self.usage.reserved += size
            granted.append((index, offset))
        return granted

    def commit(self, owner: int, key: BlockKey, offset: int, digest: int) -> bool:
        """The block is written: found from now on. False if the reservation is not this owner's (any more)."""
        entry = self._reserved.get(key)
        if entry is None or (entry.owner, entry.offset) != (owner, offset):
            return False
        if not self._ledger.write(Line(key, offset, entry.num_bytes, digest)):
            self._cool(entry)
            return False
        entry.state, entry.digest = State.READY, digest
        self._ready[key] = self._reserved.pop(key)
        self.usage.reserved -= aligned(entry.num_bytes)
        self.usage.ready += aligned(entry.num_bytes)
        self.counts.committed += 1
        self.on_change(key, True)
        return True

    def abandon(self, owner: int, keys: Sequence[BlockKey]) -> None:
        """The owner will not write these; what it has not reserved is passed over."""
        for key in keys:
            entry = self._reserved.get(key)
            if entry is not None and entry.owner == owner:
                self._cool(entry)

    def quarantine(self, key: BlockKey, offset: int, digest: int) -> bool:
        """A reader found other bytes than were committed. False if it speaks of a block that is gone already."""
        entry = self._ready.get(key)
        if entry is None or (entry.offset, entry.digest) != (offset, digest):
            return False
        self._cool(entry)
        self.counts.quarantined += 1
        return True

    def drop(self, keys: Sequence[BlockKey]) -> int:
        """Forgets complete blocks; returns how many there were."""
        known = [self._ready[key] for key in keys if key in self._ready]
        for entry in known:
            self._cool(entry)
        return len(known)

    def forget_owner(self, owner: int) -> None:
        """Its connection has ended: its pins end, and its reservations after a moment in which it may still write."""
        for held_by, lease in [name for name in self._leases if name[0] == owner]:
            self.release(held_by, lease)
        for entry in [e for e in self._reserved.values() if e.owner == owner]:
            self._cool(entry)

    def expire(self) -> None:
        """Ends what is past its deadline. To be called every now and then."""
        now_s = self._clock.monotonic_s()
        for name in [name for name, lease in self._leases.items() if now_s > lease.deadline_s]:
            self.release(*name)
            self.counts.expired += 1
        for entry in [e for e in self._reserved.values() if now_s > e.deadline_s]:
            self._cool(entry)
            self.counts.expired += 1
        for entry in [e for e in self._cooling if now_s >= e.deadline_s and e.pins == 0]:
            self._cooling.remove(entry)
            self.usage.cooling -= aligned(entry.num_bytes)
            self._ranges.give(entry.offset, aligned(entry.num_bytes))

    def _make_room(self, size: int) -> int | None:
        if self.usage.reserved + size > self.capacity_bytes * RESERVED_SHARE:
            return None
        for _ in range(MAX_EVICTIONS):
            offset = self._ranges.take(size)
            if offset is not None:
                return offset
            victim = next((entry for entry in self._ready.values() if entry.pins == 0), None)
            if victim is None:
                return None
            self._evict(victim)
        return None

    def _evict(self, entry: Entry) -> None:
        """Unpinned and complete: nobody writes it, and a reader without a pin compares digests."""
        self._remove(entry)
        self._ranges.give(entry.offset, aligned(entry.num_bytes))
        self.counts.evicted += 1

    def _cool(self, entry: Entry) -> None:
        self._remove(entry)
        entry.state = State.COOLING
        entry.deadline_s = self._clock.monotonic_s() + COOLING_S
        self.usage.cooling += aligned(entry.num_bytes)
        self._cooling.append(entry)

    def _remove(self, entry: Entry) -> None:
        if entry.state is State.READY:
            del self._ready[entry.key]
            self._ledger.clear(entry.key)
            self.usage.ready -= aligned(entry.num_bytes)
            self.on_change(entry.key, False)
        else:
            del self._reserved[entry.key]
            self.usage.reserved -= aligned(entry.num_bytes)

    def _take_over(self, line: Line) -> None:
        if not self._ranges.claim(line.offset, aligned(line.num_bytes)):
            self._ledger.clear(line.key)
            return
        entry = Entry(line.key, line.offset, line.num_bytes, 0, State.READY, 0.0, line.digest)
        self._ready[line.key] = entry
        self.usage.ready += aligned(line.num_bytes)
        self.counts.taken_over += 1
