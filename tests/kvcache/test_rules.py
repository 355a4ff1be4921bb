"""The rules of a cache server, seen by its clients and in the tiers below: what is written when, for whom, how long."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from core.clock import ManualClock
from core.errors import BatonError
from kvcache import wire
from kvcache.client import CacheClient, drop_all
from kvcache.descent import FREE_SHARE
from kvcache.faulty_tier import FaultyTier, TierFaults
from kvcache.keys import tenant_of
from kvcache.pace import RETRY_S, Pace
from kvcache.rules import Admit, Rules, Write
from kvcache.tier import Tier
from tests.kvcache.local_server import LocalServer, serving_here
from tests.kvcache.memory_tier import MemoryTier
from tests.kvcache.places import BLOCK_BYTES, key
from tests.kvcache.test_server import answer, chain
from tests.poll import until

NUM_BLOCKS = 32
ARENA_BYTES = NUM_BLOCKS * BLOCK_BYTES
ALICE, BOB = tenant_of("alice"), tenant_of("bob")


@contextmanager
def serving(
    folder: Path, *tiers: Tier, rules: Rules, clock: ManualClock | None = None
) -> Iterator[tuple[LocalServer, CacheClient]]:
    """A server under these rules, and a client of it."""
    with serving_here(folder, ARENA_BYTES, *tiers, rules=rules, clock=clock) as server:
        client = CacheClient(server.socket, wire.Hello("engine", "boot", BLOCK_BYTES))
        until(lambda: client.is_connected, what="the connection")
        yield server, client
        client.close()


def store(client: CacheClient, *numbers: int, tenant: bytes = b"") -> int:
    """Returns how many were taken, when everybody can find them."""
    granted = answer(client, client.reserve(chain(*numbers), tenant))
    client.send(wire.Commit([wire.Written(key(numbers[g.index]), g.offset, 7) for g in granted.grants]))
    found(client, 0)
    return len(granted.grants)


def found(client: CacheClient, *numbers: int, tenant: bytes = b"") -> int:
    """How many of them are there when what is coming from below has come."""
    number = client.search(chain(*numbers), reserve=False, tenant=tenant)
    result = answer(client, number)
    while isinstance(result, wire.Found) and result.coming:
        result = answer(client, number)
    assert isinstance(result, wire.Found)
    client.send(wire.Release(number))
    return len(result.slots)


def test_write_back_writes_a_block_when_it_leaves_and_finds_it_again(tmp_path: Path) -> None:
    tier = MemoryTier()
    with serving(tmp_path, tier, rules=Rules(write=Write.BACK)) as (server, client):

        def scan(*numbers: int) -> None:
            most_bytes = ARENA_BYTES * (1 - FREE_SHARE)
            for number in numbers:
                store(client, number)
                until(lambda: server.figures()["ready_bytes"] <= most_bytes, what="room for the next")

        store(client, 1, 2, 3)
        assert not tier.kept, "nothing needs their room"
        scan(*range(100, 100 + 2 * NUM_BLOCKS))
        figures = server.figures()
        assert key(1) in tier.kept
        assert figures["evicted_space_blocks"] == len(tier.kept) > NUM_BLOCKS
        assert figures["unwritten_blocks"] == figures["memory_dropped"] == 0
        assert found(client, 1, 2) == 2
        assert server.figures()["memory_hits"] == 2
        scan(*range(200, 200 + NUM_BLOCKS))
        assert server.figures()["memory_puts"] == len(tier.kept), "what came up is not written again"


def test_write_back_writes_all_of_the_arena_before_an_orderly_stop(tmp_path: Path) -> None:
    tier = MemoryTier()
    with serving(tmp_path, tier, rules=Rules(write=Write.BACK)) as (_, client):
        store(client, 1, 2, 3)
        assert not tier.kept
    assert set(tier.kept) == {key(1), key(2), key(3)}


def test_a_tier_that_hangs_delays_an_orderly_stop_by_seconds_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcache.descent.DRAIN_S", 0.3)
    tier = FaultyTier(MemoryTier(), TierFaults(hang_s=60.0))
    with serving(tmp_path, tier, rules=Rules(write=Write.BACK)) as (_, client):
        store(client, 1, 2, 3)


def test_write_back_to_a_tier_that_takes_nothing_evicts_and_counts(tmp_path: Path) -> None:
    tier = FaultyTier(MemoryTier(), TierFaults(full=True))
    with serving(tmp_path, tier, rules=Rules(write=Write.BACK)) as (server, client):
        for number in range(2 * NUM_BLOCKS):
            assert store(client, number) == 1, "an engine does not notice"
        until(lambda: server.figures()["unwritten_blocks"] > 0, what="the count")
        assert server.figures()["memory_dropped"] > 0


def test_admit_second_writes_what_a_request_has_found(tmp_path: Path) -> None:
    tier = MemoryTier()
    with serving(tmp_path, tier, rules=Rules(admit=Admit.SECOND)) as (server, client):
        store(client, 1, 2, 3)
        assert found(client, 1, 2) == 2
        until(lambda: len(tier.kept) == 2, what="the blocks that were used")
        assert found(client, 1, 2) == 2
        assert set(tier.kept) == {key(1), key(2)}
        assert server.figures()["memory_puts"] == 2, "each once"


def test_a_tenants_quota_holds_over_the_socket_also_for_what_comes_up(tmp_path: Path) -> None:
    tier = MemoryTier()
    with serving(tmp_path, tier, rules=Rules(quota_bytes=4 * BLOCK_BYTES)) as (server, client):
        store(client, 1, 2, tenant=ALICE)
        for number in range(10, 20):
            store(client, number, tenant=BOB)
            until(lambda number=number: key(number) in tier.kept, what="the block below")  # type: ignore[misc]
        figures = server.figures()
        assert (figures["evicted_quota_blocks"], figures["blocks"], figures["tenants"]) == (6, 6, 2)
        assert found(client, 10, 11, tenant=BOB) == 2
        assert server.figures()["evicted_quota_blocks"] == 8
        assert found(client, 1, 2) == 2


def test_what_nobody_uses_leaves_the_arena_and_stays_below(tmp_path: Path) -> None:
    tier, clock = MemoryTier(), ManualClock()
    with serving(tmp_path, tier, rules=Rules(ttl_s=60.0), clock=clock) as (server, client):
        store(client, 1, 2)
        until(lambda: len(tier.kept) == 2, what="the blocks below")
        clock.advance(61.0)
        until(lambda: server.figures()["blocks"] == 0, what="their time to be over")
        assert server.figures()["evicted_ttl_blocks"] == 2
        assert found(client, 1, 2) == 2


def test_write_back_writes_what_nobody_uses_before_it_leaves(tmp_path: Path) -> None:
    tier, clock = MemoryTier(), ManualClock()
    with serving(tmp_path, tier, rules=Rules(ttl_s=60.0, write=Write.BACK), clock=clock) as (server, client):
        store(client, 1, 2)
        clock.advance(61.0)
        until(lambda: server.figures()["blocks"] == 0, what="their time to be over")
        assert set(tier.kept) == {key(1), key(2)}
        assert server.figures()["unwritten_blocks"] == 0


def test_drop_empties_the_arena_and_every_tier_whole(tmp_path: Path) -> None:
    tier = MemoryTier()
    with serving(tmp_path, tier, rules=Rules()) as (_, client):
        for number in range(2 * NUM_BLOCKS):
            store(client, number)
            until(lambda number=number: key(number) in tier.kept, what="the block below")  # type: ignore[misc]
        figures = drop_all(str(tmp_path / "cache.sock"))
        assert (figures["blocks"], figures["memory_blocks"], figures["clearing"]) == (0, 0, 0)
        assert figures["dropped_blocks"] > 0
        assert found(client, 1) == found(client, 2 * NUM_BLOCKS - 1) == 0


class GatedTier(MemoryTier):
    """Its puts and gets stand still, a get with the block in its hands, while the gate is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.num_waiting = 0

    def get(self, key: bytes, into: memoryview) -> int | None:
        digest = super().get(key, into)
        self._pass()
        return digest

    def put(self, key: bytes, digest: int, block: memoryview) -> bool:
        self._pass()
        return super().put(key, digest, block)

    def _pass(self) -> None:
        self.num_waiting += 1
        assert self.gate.wait(20.0), "nobody has opened the gate"


def test_what_is_or_will_be_written_down_while_it_is_dropped_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcache.descent.MAX_QUEUED_SHARE", 1.0)
    tier = GatedTier()
    with serving(tmp_path, tier, rules=Rules()) as (server, client):
        store(client, *range(10))
        store(client, *range(10, 20))
        until(lambda: tier.num_waiting, what="a put to begin")
        client.send(wire.Drop())
        until(lambda: server.figures()["clearing"] == 1, what="the drop to begin")
        tier.gate.set()
        until(lambda: server.figures()["clearing"] + server.figures()["cooling_bytes"] == 0, what="its end")
        assert not tier.kept


def test_what_is_coming_up_while_it_is_dropped_does_not_come_back(tmp_path: Path) -> None:
    tier, clock = GatedTier(), ManualClock()
    tier.gate.set()
    with serving(tmp_path, tier, rules=Rules(ttl_s=60.0), clock=clock) as (server, client):
        store(client, 1)
        until(lambda: tier.kept, what="the block below")
        clock.advance(61.0)
        until(lambda: server.figures()["blocks"] == 0, what="the block to leave the arena")
        tier.gate.clear()
        num_waiting = tier.num_waiting
        number = client.search(chain(1), reserve=False)
        coming = answer(client, number)
        assert isinstance(coming, wire.Found)
        assert coming.coming == 1
        until(lambda: tier.num_waiting > num_waiting, what="the block to be read")
        assert drop_all(server.socket)["clearing"] == 0
        tier.gate.set()
        last = answer(client, number)
        assert isinstance(last, wire.Found)
        assert last.slots == []
        assert server.figures()["blocks"] == 0


def test_a_tier_that_cannot_be_cleared_is_named(tmp_path: Path) -> None:
    from cluster.cache_command import _drop_all  # what `baton cache drop` does

    kept = MemoryTier()
    tier = FaultyTier(kept, TierFaults())
    with serving(tmp_path, tier, rules=Rules()) as (server, client):
        store(client, 1)
        until(lambda: kept.kept, what="the block below")
        tier.faults = TierFaults(fail_every=1)
        with pytest.raises(BatonError, match="memory did not forget its blocks"):
            _drop_all(server.socket)
        assert server.figures()["memory_uncleared"] == 1


def test_a_load_is_part_of_a_step_where_it_holds_up_nobody() -> None:
    pace = Pace(ManualClock())
    assert not pace.fits_a_step(1, may_wait_s=1.0), "nothing was measured"
    pace.loaded(1000, 0.002, 0.02)
    assert pace.fits_a_step(40_000, may_wait_s=0.1), "a step of its own may wait for a moment"
    assert not pace.fits_a_step(60_000, may_wait_s=0.1)
    assert not pace.fits_a_step(1, may_wait_s=0.0), "how long a step of others takes is not known"
    pace.computed(1, 0.05)
    pace.computed(512, 20.0)
    assert pace.fits_a_step(2000, may_wait_s=0.0), "copied before the others' next tokens are there"
    assert not pace.fits_a_step(3000, may_wait_s=0.0), "and not measured by a step that computes a prompt"


def test_an_engine_that_loads_slower_than_it_computes_stores_nothing_but_a_try_now_and_then(tmp_path: Path) -> None:
    clock = ManualClock()
    pace = Pace(clock)
    assert pace.is_worth_storing(), "nothing was measured"
    pace.computed(100, 1.0)
    pace.loaded(100, 2.0, 2.0)
    assert [pace.is_worth_storing() for _ in range(3)] == [True, False, False], "one try"
    assert pace.is_worth_loading(), "has a try of its own"
    clock.advance(RETRY_S)
    assert [pace.is_worth_storing() for _ in range(2)] == [True, False]
    for _ in range(20):
        pace.loaded(100, 0.1, 0.1)
    assert pace.is_worth_storing()
