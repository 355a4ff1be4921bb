"""Who may use which bytes of an arena: blocks by key, from reservation to eviction.

    reserve ──▶ RESERVED ── commit ──▶ READY ── search pins, release unpins ──▶ evicted, in the policy's order
                   └─ abandon, deadline, owner gone ──▶ COOLING ──▶ free        (a late writer may still be copying)

Only READY blocks are found. A pin keeps a block's bytes until it is released, its deadline passes or its owner is
gone; the reader compares the digest after its copy all the same, so a lost pin costs a miss and never a wrong byte.

Memory model: offsets into an arena that is mapped by others; nothing here reads or writes it.
Threading: the server's thread only. Every duration is in seconds of the clock that is passed in.
"""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from core.clock import Clock
from kvcache.counts import Counts, Reason, Usage
from kvcache.keys import BlockKey
from kvcache.ledger import Ledger, Line
from kvcache.order import Order
from kvcache.ranges import Ranges, aligned
from kvcache.rules import Rules

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

UNKNOWN_TENANT = b"?"
"""Of blocks that were taken over: the ledger does not say whose they are."""


class State(enum.Enum):
    """Of one block's bytes."""

    RESERVED = "reserved"
    READY = "ready"
    COOLING = "cooling"


@dataclass(slots=True)
class Entry:
    """One block's bytes. `deadline_s`: of the reservation, or the end of cooling. `is_below`: a tier below the arena
    has it, or is about to get it."""

    key: BlockKey
    offset: int
    num_bytes: int
    owner: int
    state: State
    deadline_s: float
    digest: int = 0
    pins: int = 0
    tenant: bytes = b""
    is_below: bool = False


@dataclass
class Lease:
    """What one search pinned."""

    entries: list[Entry]
    deadline_s: float


class Index:
    """The blocks of one arena of `capacity_bytes`. Takes over what the ledger still knows.

    retire: what happens to a block that nobody has used for the rules' time; it is evicted unless told otherwise.
    """

    def __init__(self, capacity_bytes: int, ledger: Ledger, clock: Clock, rules: Rules | None = None) -> None:
        self.capacity_bytes = capacity_bytes
        self.rules = rules or Rules()
        self.counts = Counts()
        self.reasons: Counter[Reason] = Counter()
        self.usage = Usage()
        self.retire: Callable[[Entry], None] = lambda entry: self.evict(entry, Reason.TTL)
        self._ledger = ledger
        self._clock = clock
        self._ranges = Ranges(capacity_bytes)
        self._reserved: dict[BlockKey, Entry] = {}
        self._ready: dict[BlockKey, Entry] = {}
        self._order = Order(self.rules, clock)
        self._tenants: Counter[bytes] = Counter()
        self._kept: set[BlockKey] = set()
        self._cooling: list[Entry] = []
        self._leases: dict[tuple[int, int], Lease] = {}
        for line in ledger.lines():
            self._take_over(line)

    def __len__(self) -> int:
        return len(self._ready)

    @property
    def free_bytes(self) -> int:
        """That nothing has to be evicted for."""
        return self._ranges.free_bytes

    @property
    def num_tenants(self) -> int:
        """That have bytes in the arena."""
        return len(self._tenants)

    def entries(self) -> list[Entry]:
        """Complete blocks."""
        return list(self._ready.values())

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
        """A chain of blocks is recent, and its end goes before its beginning, which others may share."""
        self._order.touched(keys)

    def use(self, keys: Sequence[BlockKey]) -> None:
        """A request asked for a chain of blocks and got it: counts where the policy counts uses."""
        self._order.used(keys)

    def reserve(
        self, owner: int, keys: Sequence[BlockKey], num_bytes: int, tenant: bytes = b""
    ) -> list[tuple[int, int]]:
        """(index into keys, offset) of blocks that `owner` may write now, on its tenant's account.

        Keys that somebody has written or is writing are left out. Stops at the first block that finds no room: what
        follows it could not be found without it.
        """
        granted = []
        size = aligned(num_bytes)
        for index, key in enumerate(keys):
            if key in self._ready or key in self._reserved:
                continue
            offset = self._make_room(size, tenant)
            if offset is None:
                self.counts.refused += len(keys) - index
                break
            deadline_s = math.inf if owner == SERVER else self._clock.monotonic_s() + RESERVATION_S
            self._reserved[key] = Entry(key, offset, num_bytes, owner, State.RESERVED, deadline_s, tenant=tenant)
            self.usage.reserved += size
            self._tenants[tenant] += size
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
        del self._reserved[key]
        self.usage.reserved -= aligned(entry.num_bytes)
        self._add_ready(entry)
        self.counts.committed += 1
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

    def drop(self, keys: Sequence[BlockKey], reason: Reason = Reason.DROP) -> int:
        """Forgets complete blocks; returns how many there were."""
        known = [self._ready[key] for key in keys if key in self._ready]
        for entry in known:
            self._cool(entry)
        self.reasons[reason] += len(known)
        return len(known)

    def keep(self, keys: Sequence[BlockKey]) -> None:
        """These are not evicted, now or when they are complete, until they are let go. None of them is kept yet."""
        self._kept.update(keys)
        for entry in self._ready_of(keys):
            self._order.removed(entry.key)
            self.usage.pinned += aligned(entry.num_bytes)

    def let_go(self, keys: Sequence[BlockKey]) -> None:
        """The end of `keep`; they are all kept."""
        self._kept.difference_update(keys)
        for entry in self._ready_of(reversed(keys)):
            self._order.admitted(entry.key, entry.tenant)
            self.usage.pinned -= aligned(entry.num_bytes)

    def coldest(self) -> Entry | None:
        """The complete block that goes next; it is out of the order, so to be given to `take`. None if none may go."""
        key = self._order.victim(self._may_go)
        return self._ready[key] if key is not None else None

    def take(self, entry: Entry) -> None:
        """A complete block will leave: it is pinned, and out of the order, until `settle`."""
        self._order.removed(entry.key)
        entry.pins += 1

    def settle(self, entry: Entry, reason: Reason) -> None:
        """The end of `take`: the block is evicted, or goes back into the order if somebody uses it by now."""
        entry.pins -= 1
        if entry.state is not State.READY or entry.key in self._kept:
            return
        if entry.pins:
            self._order.removed(entry.key)
            self._order.admitted(entry.key, entry.tenant)
        else:
            self.evict(entry, reason)

    def evict(self, entry: Entry, reason: Reason) -> None:
        """Unpinned and complete: nobody writes it, and a reader without a pin compares digests."""
        self._remove(entry)
        self._ranges.give(entry.offset, aligned(entry.num_bytes))
        self.counts.evicted += 1
        self.counts.unwritten += not entry.is_below
        self.reasons[reason] += 1

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
        for key in self._order.idle():
            if self._may_go(key):
                self.retire(self._ready[key])
        for entry in [e for e in self._cooling if now_s >= e.deadline_s and e.pins == 0]:
            self._cooling.remove(entry)
            self.usage.cooling -= aligned(entry.num_bytes)
            self._ranges.give(entry.offset, aligned(entry.num_bytes))

    def _make_room(self, size: int, tenant: bytes) -> int | None:
        if self.usage.reserved + size > self.capacity_bytes * RESERVED_SHARE or not self._fits_quota(size, tenant):
            return None
        for _ in range(MAX_EVICTIONS):
            offset = self._ranges.take(size)
            if offset is not None:
                return offset
            victim = self._order.victim(self._may_go)
            if victim is None:
                return None
            self.evict(self._ready[victim], Reason.SPACE)
        return None

    def _fits_quota(self, size: int, tenant: bytes) -> bool:
        """Whether the tenant may have so much more, after some of its own blocks have gone for it."""
        quota_bytes = self.rules.quota_bytes
        while quota_bytes and self._tenants[tenant] + size > quota_bytes:
            victim = self._order.victim_of(tenant, self._may_go)
            if victim is None:
                return False
            self.evict(self._ready[victim], Reason.QUOTA)
        return True

    def _may_go(self, key: BlockKey) -> bool:
        return self._ready[key].pins == 0

    def _ready_of(self, keys: Iterable[BlockKey]) -> list[Entry]:
        return [entry for key in keys if (entry := self._ready.get(key)) is not None]

    def _add_ready(self, entry: Entry) -> None:
        self._ready[entry.key] = entry
        self.usage.ready += aligned(entry.num_bytes)
        if entry.key in self._kept:
            self.usage.pinned += aligned(entry.num_bytes)
        else:
            self._order.admitted(entry.key, entry.tenant)

    def _cool(self, entry: Entry) -> None:
        self._remove(entry)
        entry.state = State.COOLING
        entry.deadline_s = self._clock.monotonic_s() + COOLING_S
        self.usage.cooling += aligned(entry.num_bytes)
        self._cooling.append(entry)

    def _remove(self, entry: Entry) -> None:
        self._tenants[entry.tenant] -= aligned(entry.num_bytes)
        if not self._tenants[entry.tenant]:
            del self._tenants[entry.tenant]
        if entry.state is State.READY:
            del self._ready[entry.key]
            self._order.removed(entry.key)
            self._ledger.clear(entry.key)
            self.usage.ready -= aligned(entry.num_bytes)
            self.usage.pinned -= aligned(entry.num_bytes) if entry.key in self._kept else 0
        else:
            del self._reserved[entry.key]
            self.usage.reserved -= aligned(entry.num_bytes)

    def _take_over(self, line: Line) -> None:
        if not self._ranges.claim(line.offset, aligned(line.num_bytes)):
            self._ledger.clear(line.key)
            return
        tenant = UNKNOWN_TENANT
        self._add_ready(Entry(line.key, line.offset, line.num_bytes, 0, State.READY, 0.0, line.digest, tenant=tenant))
        self._tenants[tenant] += aligned(line.num_bytes)
        self.counts.taken_over += 1
