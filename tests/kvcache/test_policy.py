"""What goes next: each policy in its order, never a block that is gone or pinned, always some block if one may go."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from core.errors import ConfigError
from kvcache.policy import POLICIES, Policy, make_policy
from tests.kvcache.places import key

KEYS = st.integers(0, 11)
CHAINS = st.lists(KEYS, max_size=6, unique=True)
EVERY = st.sets(KEYS)


class Asked:
    """Lets no block go, and remembers which it was asked for."""

    def __init__(self) -> None:
        self.keys: set[bytes] = set()

    def __call__(self, key: bytes) -> bool:
        self.keys.add(key)
        return False


class PolicyMachine(RuleBasedStateMachine):
    """Blocks that come, are used, pinned, dropped and evicted, under each policy."""

    def __init__(self) -> None:
        super().__init__()
        self.policy: Policy = make_policy("lru")
        self.there: set[bytes] = set()

    @initialize(name=st.sampled_from(sorted(POLICIES)))
    def choose(self, name: str) -> None:
        self.policy = make_policy(name)

    @rule(number=KEYS)
    def admit(self, number: int) -> None:
        if key(number) not in self.there:
            self.policy.admitted(key(number))
            self.there.add(key(number))

    @rule(chain=CHAINS)
    def touch(self, chain: list[int]) -> None:
        self.policy.touched([key(n) for n in chain])

    @rule(chain=CHAINS)
    def use(self, chain: list[int]) -> None:
        self.policy.used([key(n) for n in chain])

    @rule(number=KEYS)
    def remove(self, number: int) -> None:
        self.policy.removed(key(number))
        self.there.discard(key(number))

    @rule(pinned=EVERY)
    def evict(self, pinned: set[int]) -> None:
        may_go = self.there - {key(n) for n in pinned}
        victim = self.policy.victim(lambda key: key in may_go)
        if victim is None:
            assert not may_go, "a block may go, and none was named"
        else:
            assert victim in may_go
            self.there.remove(victim)

    @precondition(lambda self: self.there)
    @invariant()
    def asks_only_of_blocks_in_its_books(self) -> None:
        asked = Asked()
        assert self.policy.victim(asked) is None
        assert asked.keys <= self.there


PolicyMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestPolicies = PolicyMachine.TestCase


class Arena:
    """Room for so many blocks under a policy: `ask` uses the prefix that is there and stores the rest."""

    def __init__(self, name: str, capacity: int) -> None:
        self.policy = make_policy(name)
        self.capacity = capacity
        self.there: set[int] = set()
        self._numbers = {key(number): number for number in range(2000)}

    def ask(self, *chain: int) -> int:
        """Returns how many blocks were found."""
        num_found = next((at for at, number in enumerate(chain) if number not in self.there), len(chain))
        self.policy.used([key(n) for n in chain[:num_found]])
        for number in chain[num_found:]:
            if number in self.there:
                continue
            if len(self.there) == self.capacity:
                victim = self.policy.victim(lambda _: True)
                assert victim is not None
                self.there.remove(self._numbers[victim])
            self.policy.admitted(key(number))
            self.there.add(number)
        self.policy.touched([key(n) for n in chain])
        return num_found

    def leave(self, how_many: int) -> list[int]:
        """The next victims."""
        victims = [self.policy.victim(lambda _: True) for _ in range(how_many)]
        return [self._numbers[victim] for victim in victims if victim is not None]


def scan(arena: Arena, numbers: Iterable[int]) -> None:
    for number in numbers:
        arena.ask(number)


def hot_set_after_a_scan(name: str) -> int:
    """Twenty blocks in use, then a thousand others once each through an arena of a hundred: how many of them stay."""
    arena, hot = Arena(name, 100), range(20)
    for _ in range(3):
        scan(arena, hot)
    scan(arena, range(1000, 2000))
    return len(arena.there & set(hot))


def test_a_scan_washes_a_hot_set_out_of_lru_and_not_out_of_s3fifo() -> None:
    assert hot_set_after_a_scan("lru") == 0
    assert hot_set_after_a_scan("s3fifo") == 20
    assert hot_set_after_a_scan("fifo") == 0
    assert hot_set_after_a_scan("lfu") == 20


def test_lru_lets_the_least_recently_used_chain_go_and_of_a_chain_the_end_first() -> None:
    arena = Arena("lru", 6)
    arena.ask(1, 2, 3)
    arena.ask(4, 5, 6)
    arena.ask(1, 2)
    assert arena.leave(6) == [3, 6, 5, 4, 2, 1]


def test_fifo_lets_go_what_was_stored_first_whatever_was_used() -> None:
    arena = Arena("fifo", 4)
    scan(arena, (1, 2, 3, 4))
    scan(arena, (1, 1, 1))
    assert arena.leave(4) == [1, 2, 3, 4]


def test_lfu_keeps_what_is_used_often_and_old_favourites_leave_in_the_end() -> None:
    arena = Arena("lfu", 3)
    for _ in range(5):
        arena.ask(1)
    scan(arena, (2, 3, 4, 5, 6))
    assert 1 in arena.there
    for number in range(100, 200):
        for _ in range(3):
            arena.ask(number)
    assert 1 not in arena.there, "it was used five times, long ago"


def test_lfu_tidies_its_heap_however_often_blocks_are_used() -> None:
    policy = make_policy("lfu")
    policy.admitted(key(1))
    for _ in range(10_000):
        policy.used([key(1)])
    assert len(policy._heap) < 200  # type: ignore[attr-defined]


def test_s3fifo_takes_back_into_its_main_queue_what_it_let_go_too_early() -> None:
    arena = Arena("s3fifo", 10)
    scan(arena, range(10))
    scan(arena, range(10, 15))
    assert 0 not in arena.there
    arena.ask(0)
    scan(arena, range(100, 200))
    assert 0 in arena.there, "asked for twice, although it had left in between"


def test_an_unknown_policy_is_refused_with_the_list() -> None:
    with pytest.raises(ConfigError, match="policy=mru is none of lru, lfu, fifo, s3fifo"):
        make_policy("mru")
