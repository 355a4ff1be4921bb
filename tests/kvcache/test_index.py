"""The server's book-keeping: no two blocks share bytes, only complete blocks are found, everything held comes back."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from core.clock import ManualClock
from kvcache.counts import Reason
from kvcache.entry import Entry, State
from kvcache.index import COOLING_S, RESERVATION_S, UNKNOWN_TENANT, Index
from kvcache.leases import LEASE_S
from kvcache.ledger import Ledger
from kvcache.policy import POLICIES
from kvcache.ranges import ALIGNMENT, Ranges, aligned
from kvcache.rules import Rules
from tests.kvcache.places import key, ledger_of
from tests.kvcache.test_policy import Asked

CAPACITY = 12 * ALIGNMENT
KEYS = st.integers(0, 19)
CHAINS = st.lists(KEYS, min_size=1, max_size=6, unique=True)
OWNERS = st.integers(1, 3)
QUOTA = 5 * ALIGNMENT
RULES = st.builds(
    Rules,
    st.sampled_from(sorted(POLICIES)),
    ttl_s=st.sampled_from([0.0, 50.0]),
    quota_bytes=st.sampled_from([0, QUOTA]),
)


class IndexMachine(RuleBasedStateMachine):
    """Writers and readers that come, go, die and are late, over an arena of twelve small blocks, under any rules."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.ledger, self.memory = ledger_of(CAPACITY)
        self.chosen = Rules()
        self.index = Index(CAPACITY, self.ledger, self.clock)
        self.kept: set[int] = set()
        self.taken: list[Entry] = []
        self.granted: dict[tuple[int, int], int] = {}
        self.pinned: dict[tuple[int, int], list[Entry]] = {}
        self.num_leases = 0

    def teardown(self) -> None:
        self.memory.close()

    @initialize(rules=RULES)
    def choose(self, rules: Rules) -> None:
        self.chosen = rules
        self.index = Index(CAPACITY, self.ledger, self.clock, rules)

    @rule(
        owner=OWNERS,
        chain=CHAINS,
        size=st.sampled_from([1, ALIGNMENT, ALIGNMENT + 1]),
        tenant=st.sampled_from([b"", b"alice", b"bob"]),
    )
    def reserve(self, owner: int, chain: list[int], size: int, tenant: bytes) -> None:
        before = self.index.tenant_bytes[tenant]
        others = {entry.key for entry in self.index.complete.entries() if entry.tenant != tenant}
        quota = self.index.reasons[Reason.QUOTA]
        space = self.index.reasons[Reason.SPACE]
        for index, offset in self.index.reserve(owner, [key(n) for n in chain], size, tenant):
            self.granted[owner, chain[index]] = offset
        after = self.index.tenant_bytes[tenant]
        assert not self.chosen.quota_bytes or after <= max(before, QUOTA)
        if self.index.reasons[Reason.QUOTA] > quota and self.index.reasons[Reason.SPACE] == space:
            assert others <= set(self.index.complete.keys()), "a tenant's quota has cost another's block"

    @rule(number=KEYS)
    def keep_or_let_go(self, number: int) -> None:
        if number in self.kept:
            self.index.complete.leaving.let_go([key(number)])
        else:
            self.index.complete.leaving.keep([key(number)])
        self.kept ^= {number}

    @rule()
    def take(self) -> None:
        entry = self.index.complete.leaving.victim()
        if entry is not None:
            assert entry.pins == 0
            self.index.take(entry)
            self.taken.append(entry)

    @precondition(lambda self: self.taken)
    @rule()
    def settle(self) -> None:
        self.index.settle(self.taken.pop(0), Reason.SPACE)

    @rule(chain=CHAINS)
    def use(self, chain: list[int]) -> None:
        self.index.complete.leaving.use([key(n) for n in chain])
        self.index.complete.leaving.touch([key(n) for n in chain])

    @rule(owner=OWNERS, number=KEYS)
    def commit(self, owner: int, number: int) -> None:
        offset = self.granted.pop((owner, number), -1)
        before = self.index.counts.committed
        done = self.index.commit(owner, key(number), offset, number)
        assert self.index.counts.committed == before + done
        assert not done or offset >= 0, "committed without a reservation"

    @rule(owner=OWNERS, number=KEYS)
    def abandon(self, owner: int, number: int) -> None:
        self.granted.pop((owner, number), None)
        self.index.abandon(owner, [key(number)])

    @rule(owner=OWNERS, chain=CHAINS)
    def search(self, owner: int, chain: list[int]) -> None:
        self.num_leases += 1
        found = self.index.search(owner, self.num_leases, [key(n) for n in chain])
        assert [entry.key for entry in found] == [key(n) for n in chain[: len(found)]]
        assert all(entry.state is State.READY for entry in found)
        assert [entry.digest for entry in found] == chain[: len(found)]
        self.pinned[owner, self.num_leases] = found

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.pinned)))
        self.index.leases.release(*name)
        del self.pinned[name]

    @rule(owner=OWNERS)
    def die(self, owner: int) -> None:
        self.index.forget_owner(owner)
        self.granted = {name: offset for name, offset in self.granted.items() if name[0] != owner}
        self.pinned = {name: found for name, found in self.pinned.items() if name[0] != owner}

    @rule(number=KEYS)
    def spoil(self, number: int) -> None:
        found = self.index.search(9, 1, [key(number)])
        if found:
            assert self.index.quarantine(key(number), found[0].offset, found[0].digest)
            assert self.index.search(9, 2, [key(number)]) == []
        assert not self.index.quarantine(key(number), 1, 1)
        self.index.leases.release(9, 1)

    @rule()
    def pass_time(self) -> None:
        self.clock.advance(COOLING_S)
        self.index.expire()

    @rule()
    def wait_for_ever(self) -> None:
        self.clock.advance(max(LEASE_S, RESERVATION_S) + 1)
        self.index.expire()
        self.granted.clear()
        self.pinned.clear()
        for entry in self.taken:
            self.index.settle(entry, Reason.SPACE)
        self.taken.clear()
        self.clock.advance(COOLING_S)
        self.index.expire()
        assert self.index.usage.reserved == self.index.usage.cooling == 0
        assert not self.chosen.ttl_s or set(self.index.complete.keys()) <= {key(n) for n in self.kept}

    @rule()
    def restart(self) -> None:
        """A new server over the same ledger knows every complete block and nothing else."""
        before = {entry.key: (entry.offset, entry.digest) for entry in self.index.complete._all.values()}
        self.index = Index(CAPACITY, Ledger(self.memory), self.clock, self.chosen)
        self.kept.clear()
        self.taken.clear()
        after = {entry.key: (entry.offset, entry.digest) for entry in self.index.complete._all.values()}
        assert before == after
        self.granted.clear()
        self.pinned.clear()

    @invariant()
    def nobody_shares_bytes(self) -> None:
        entries = [*self.index._reserved.values(), *self.index.complete._all.values(), *self.index._cooling]
        spans = sorted((entry.offset, entry.offset + aligned(entry.num_bytes)) for entry in entries)
        assert all(left[1] <= right[0] for left, right in itertools.pairwise(spans)), spans
        assert all(start >= 0 and end <= CAPACITY for start, end in spans)
        assert sum(end - start for start, end in spans) + self.index._ranges.free_bytes == CAPACITY

    @invariant()
    def usage_adds_up(self) -> None:
        usage = self.index.usage
        assert usage.reserved + usage.ready + usage.cooling + self.index._ranges.free_bytes == CAPACITY

    @invariant()
    def tenants_add_up(self) -> None:
        entries = [*self.index._reserved.values(), *self.index.complete._all.values()]
        sums = {tenant: 0 for tenant in {entry.tenant for entry in entries}}
        for entry in entries:
            sums[entry.tenant] += aligned(entry.num_bytes)
        assert dict(self.index.tenant_bytes) == sums
        assert not self.chosen.quota_bytes or all(
            num_bytes <= QUOTA for tenant, num_bytes in sums.items() if tenant != UNKNOWN_TENANT
        )

    @invariant()
    def what_may_be_evicted_is_in_the_order_and_nothing_else(self) -> None:
        asked = Asked()
        self.index.complete.leaving._order.victim(asked)
        taken = {entry.key for entry in self.taken if self.index.complete.get(entry.key) is entry}
        kept = {key(n) for n in self.kept}
        assert asked.keys | taken | kept == set(self.index.complete._all) | taken | kept
        assert not kept & asked.keys

    @invariant()
    def what_is_kept_stays(self) -> None:
        kept = [entry for entry in self.index.complete.entries() if entry.key in {key(n) for n in self.kept}]
        assert self.index.usage.pinned == sum(aligned(entry.num_bytes) for entry in kept)

    @invariant()
    def pinned_bytes_are_nobody_elses(self) -> None:
        held = {entry.offset: entry.key for found in self.pinned.values() for entry in found}
        for entry in [*self.index._reserved.values(), *self.index.complete._all.values()]:
            assert held.get(entry.offset, entry.key) == entry.key


IndexMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestIndex = IndexMachine.TestCase


def filled(numbers: list[int], capacity: int = CAPACITY) -> tuple[Index, ManualClock]:
    clock = ManualClock()
    index = Index(capacity, ledger_of(capacity)[0], clock)
    for number in numbers:
        for _, offset in index.reserve(1, [key(number)], ALIGNMENT):
            assert index.commit(1, key(number), offset, number)
    return index, clock


def test_the_end_of_a_chain_goes_before_its_beginning_and_the_least_recently_used_chain_first() -> None:
    index, _ = filled(list(range(12)))
    index.complete.leaving.touch([key(n) for n in range(6, 12)])
    index.complete.leaving.touch([key(n) for n in range(6)])
    index.reserve(2, [key(100 + n) for n in range(3)], ALIGNMENT)
    assert [len(index.search(2, n, [key(n)])) for n in (6, 7, 8, 9, 10, 11)] == [1, 1, 1, 0, 0, 0]
    assert len(index.search(2, 99, [key(n) for n in range(6)])) == 6


def test_a_pinned_block_is_not_evicted_and_one_whose_reader_is_late_is() -> None:
    index, clock = filled(list(range(12)))
    assert len(index.search(1, 1, [key(n) for n in range(12)])) == 12
    assert index.reserve(2, [key(50)], ALIGNMENT) == []
    clock.advance(LEASE_S + 1)
    index.expire()
    assert len(index.reserve(2, [key(50)], ALIGNMENT)) == 1


def test_unfinished_blocks_may_take_half_of_the_arena_only() -> None:
    index, _ = filled(list(range(12)))
    granted = index.reserve(2, [key(100 + n) for n in range(12)], ALIGNMENT)
    assert [position for position, _ in granted] == list(range(6)), "from the beginning, or they could not be found"
    assert index.counts.refused == 6


def test_two_writers_of_one_key_get_one_place() -> None:
    index, _ = filled([])
    assert len(index.reserve(1, [key(1), key(2)], 10)) == 2
    assert [position for position, _ in index.reserve(2, [key(1), key(2), key(3)], 10)] == [2]
    assert not index.commit(2, key(1), 0, 7)


def test_a_torn_record_of_the_ledger_is_passed_over() -> None:
    ledger, memory = ledger_of(CAPACITY)
    index = Index(CAPACITY, ledger, ManualClock())
    for number in range(3):
        ((_, offset),) = index.reserve(1, [key(number)], ALIGNMENT)
        index.commit(1, key(number), offset, number)
    view = memoryview(memory._mmap)
    view[2 * 64 + 20] ^= 1
    view.release()
    again = Index(CAPACITY, Ledger(memory), ManualClock())
    assert len(again.complete) == 2
    assert len(again.search(1, 1, [key(0)])) == 1
    assert again.search(1, 2, [key(1)]) == []
    assert len(again.reserve(1, [key(9)], ALIGNMENT)) == 1
    memory.close()


def test_ranges_of_several_sizes_are_joined_again() -> None:
    ranges = Ranges(100)
    taken = [(ranges.take(size), size) for size in (10, 20, 30, 40)]
    assert ranges.take(1) is None
    for offset, size in (taken[1], taken[3], taken[0], taken[2]):
        assert offset is not None
        ranges.give(offset, size)
    assert ranges.take(100) == 0
    assert not ranges.claim(0, 1)


def test_the_index_evicts_in_the_order_of_its_policy() -> None:
    clock = ManualClock()
    index = Index(CAPACITY, ledger_of(CAPACITY)[0], clock, Rules(policy="fifo"))
    fill(index, range(12))
    index.search(1, 1, [key(0)])
    index.complete.leaving.use([key(0)])
    index.leases.release(1, 1)
    index.reserve(2, [key(100)], ALIGNMENT)
    assert index.complete.get(key(0)) is None, "first stored, first gone, although it was used last"


def test_a_tenant_over_its_quota_evicts_its_own_blocks_and_nobody_elses() -> None:
    index = Index(CAPACITY, ledger_of(CAPACITY)[0], ManualClock(), Rules(quota_bytes=QUOTA))
    fill(index, range(3), b"alice")
    fill(index, range(10, 30), b"bob")
    assert [n for n in range(3) if index.complete.get(key(n))] == [0, 1, 2], "the oldest of all, but alice's"
    assert [n for n in range(10, 30) if index.complete.get(key(n))] == [25, 26, 27, 28, 29]
    assert index.reasons == {Reason.QUOTA: 15}
    assert index.free_bytes == 4 * ALIGNMENT, "bob gets no more although there is room"
    index.search(7, 1, [key(n) for n in range(25, 30)])
    assert index.reserve(1, [key(50)], ALIGNMENT, b"bob") == [], "all of bob's blocks are being read"
    assert len(index.reserve(1, [key(51)], ALIGNMENT, b"carol")) == 1


def test_a_block_that_was_to_leave_stays_if_somebody_reads_it_by_then() -> None:
    index, _ = filled([1, 2])
    for entry in (index.complete.leaving.victim(), index.complete.leaving.victim()):
        assert entry is not None
        index.take(entry)
    index.search(7, 1, [key(2)])
    for number in (1, 2):
        entry = index.complete.get(key(number))
        assert entry is not None
        index.settle(entry, Reason.SPACE)
    assert [n for n in (1, 2) if index.complete.get(key(n))] == [2]
    index.leases.release(7, 1)
    assert index.complete.leaving.victim() is index.complete.get(key(2)), "it is in the order again"


def test_blocks_that_nobody_has_used_for_the_rules_time_leave_except_pinned_ones() -> None:
    clock = ManualClock()
    index = Index(CAPACITY, ledger_of(CAPACITY)[0], clock, Rules(ttl_s=60.0))
    fill(index, range(4))
    index.complete.leaving.keep([key(3)])
    clock.advance(40.0)
    index.complete.leaving.use([key(1)])
    clock.advance(30.0)
    index.expire()
    assert [n for n in range(4) if index.complete.get(key(n))] == [1, 3]
    assert index.reasons == {Reason.TTL: 2}
    index.complete.leaving.let_go([key(3)])
    clock.advance(61.0)
    index.expire()
    assert len(index.complete) == 0


def fill(index: Index, numbers: Iterable[int], tenant: bytes = b"") -> None:
    for number in numbers:
        for _, offset in index.reserve(1, [key(number)], ALIGNMENT, tenant):
            assert index.commit(1, key(number), offset, number)
