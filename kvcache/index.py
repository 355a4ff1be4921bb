"""Who may use which bytes of an arena: blocks by key, from reservation to eviction.

    reserve ──▶ RESERVED ── commit ──▶ READY ── search pins, release unpins ──▶ evicted, in the policy's order
                   └─ abandon, deadline, owner gone ──▶ COOLING ──▶ free        (a late writer may still be copying)

Only READY blocks are found. A pin keeps a block's bytes until it is released, its deadline passes or its owner is
gone; the reader compares the digest after its copy all the same, so a lost pin costs a miss and never a wrong byte.

Memory model: offsets into an arena that is mapped by others; nothing here reads or writes it.
Threading: the server's thread only. Every duration is in seconds of the clock that is passed in.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

from core.clock import Clock
from kvcache.complete import CompleteBlocks
from kvcache.counts import Counts, Reason, Usage
from kvcache.entry import Entry, State
from kvcache.keys import BlockKey
from kvcache.leases import Leases
from kvcache.ledger import Ledger, Line
from kvcache.ranges import Ranges, aligned
from kvcache.rules import Rules

RESERVATION_S = 120.0
"""How long a writer may take from reservation to commit: a long prompt's prefill."""

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


class Index:
    """The blocks of one arena of `capacity_bytes`. Takes over what the ledger still knows.

    retire: what happens to a block that nobody has used for the rules' time; it is evicted unless told otherwise.
    tenant_bytes: what each tenant has in the arena. questions: look-ups and wishes of all clients since the start.
    """

    def __init__(self, capacity_bytes: int, ledger: Ledger, clock: Clock, rules: Rules | None = None) -> None:
        self.capacity_bytes = capacity_bytes
        self.rules = rules or Rules()
        self.counts = Counts()
        self.reasons: Counter[Reason] = Counter()
        self.usage = Usage()
        self.questions = 0
        self.retire: Callable[[Entry], None] = lambda entry: self.evict(entry, Reason.TTL)
        self.complete = CompleteBlocks(self.rules, self.usage, clock)
        self.leases = Leases(clock)
        self.tenant_bytes: Counter[bytes] = Counter()
        self._ledger = ledger
        self._clock = clock
        self._ranges = Ranges(capacity_bytes)
        self._reserved: dict[BlockKey, Entry] = {}
        self._cooling: list[Entry] = []
        for line in ledger.lines():
            self._take_over(line)

    @property
    def free_bytes(self) -> int:
        """That nothing has to be evicted for."""
        return self._ranges.free_bytes

    def search(self, owner: int, lease: int, keys: Sequence[BlockKey]) -> list[Entry]:
        """The complete blocks of the longest prefix of `keys`, pinned until `leases.release(owner, lease)`."""
        found: list[Entry] = []
        for key in keys:
            entry = self.complete.get(key)
            if entry is None:
                break
            found.append(entry)
        self.complete.leaving.touch([entry.key for entry in found])
        self.leases.pin(owner, lease, found)
        return found

    def reserve(
        self, owner: int, keys: Sequence[BlockKey], num_bytes: int, tenant: bytes = b"", before: BlockKey = b""
    ) -> list[tuple[int, int]]:
        """(index into keys, offset) of blocks that `owner` may write now, on its tenant's account. before: they are
        partial, and follow it.

        Keys that somebody has written or is writing are left out. Stops at the first block that finds no room: what
        follows it could not be found without it.
        """
        granted = []
        size = aligned(num_bytes)
        for index, key in enumerate(keys):
            if key in self.complete or key in self._reserved:
                continue
            offset = self._make_room(size, tenant)
            if offset is None:
                self.counts.refused += len(keys) - index
                break
            deadline_s = math.inf if owner == SERVER else self._clock.monotonic_s() + RESERVATION_S
            entry = Entry(key, offset, num_bytes, owner, State.RESERVED, deadline_s, tenant=tenant, before=before)
            self._reserved[key] = entry
            self.usage.reserved += size
            self.tenant_bytes[tenant] += size
            granted.append((index, offset))
        return granted

    def commit(self, owner: int, key: BlockKey, offset: int, digest: int, lossy: str = "") -> bool:
        """The block is written: found from now on. False if the reservation is not this owner's (any more). One that a
        lossy codec has rounded is not taken over by a restarted server, which would not know that any more."""
        entry = self._reserved.get(key)
        if entry is None or (entry.owner, entry.offset) != (owner, offset):
            return False
        if not lossy and not self._ledger.write(Line(key, offset, entry.num_bytes, digest)):
            self._cool(entry)
            return False
        entry.state, entry.digest, entry.lossy = State.READY, digest, lossy
        del self._reserved[key]
        self.usage.reserved -= aligned(entry.num_bytes)
        self.complete.add(entry)
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
        entry = self.complete.get(key)
        if entry is None or (entry.offset, entry.digest) != (offset, digest):
            return False
        self._cool(entry)
        self.counts.quarantined += 1
        return True

    def drop(self, keys: Sequence[BlockKey], reason: Reason = Reason.DROP) -> int:
        """Forgets complete blocks; returns how many there were."""
        known = self.complete.of(keys)
        for entry in known:
            self._cool(entry)
        self.reasons[reason] += len(known)
        return len(known)

    def take(self, entry: Entry) -> None:
        """A complete block will leave: it is pinned, and out of the order, until `settle`."""
        self.complete.leaving.set_aside(entry)
        entry.pins += 1

    def settle(self, entry: Entry, reason: Reason) -> None:
        """The end of `take`: the block is evicted, or goes back into the order if somebody uses it by now."""
        entry.pins -= 1
        if entry.state is not State.READY or self.complete.leaving.is_kept(entry.key):
            return
        if entry.pins:
            self.complete.leaving.put_back(entry)
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
        self.leases.release_owner(owner)
        for entry in [e for e in self._reserved.values() if e.owner == owner]:
            self._cool(entry)

    def expire(self) -> None:
        """Ends what is past its deadline. To be called every now and then."""
        now_s = self._clock.monotonic_s()
        self.counts.expired += self.leases.expire()
        for entry in [e for e in self._reserved.values() if now_s > e.deadline_s]:
            self._cool(entry)
            self.counts.expired += 1
        for entry in self.complete.leaving.idle():
            self.retire(entry)
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
            victim = self.complete.leaving.victim()
            if victim is None:
                return None
            self.evict(victim, Reason.SPACE)
        return None

    def _fits_quota(self, size: int, tenant: bytes) -> bool:
        """Whether the tenant may have so much more, after some of its own blocks have gone for it."""
        quota_bytes = self.rules.quota_bytes
        while quota_bytes and self.tenant_bytes[tenant] + size > quota_bytes:
            victim = self.complete.leaving.victim_of(tenant)
            if victim is None:
                return False
            self.evict(victim, Reason.QUOTA)
        return True

    def _cool(self, entry: Entry) -> None:
        self._remove(entry)
        entry.state = State.COOLING
        entry.deadline_s = self._clock.monotonic_s() + COOLING_S
        self.usage.cooling += aligned(entry.num_bytes)
        self._cooling.append(entry)

    def _remove(self, entry: Entry) -> None:
        self.tenant_bytes[entry.tenant] -= aligned(entry.num_bytes)
        if not self.tenant_bytes[entry.tenant]:
            del self.tenant_bytes[entry.tenant]
        if entry.state is State.READY:
            self.complete.remove(entry)
            self._ledger.clear(entry.key)
        else:
            del self._reserved[entry.key]
            self.usage.reserved -= aligned(entry.num_bytes)

    def _take_over(self, line: Line) -> None:
        if not self._ranges.claim(line.offset, aligned(line.num_bytes)):
            self._ledger.clear(line.key)
            return
        tenant = UNKNOWN_TENANT
        self.complete.add(Entry(line.key, line.offset, line.num_bytes, 0, State.READY, 0.0, line.digest, tenant=tenant))
        self.tenant_bytes[tenant] += aligned(line.num_bytes)
        self.counts.taken_over += 1
