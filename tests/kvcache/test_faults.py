"""Fault by operation: whatever a tier does, no wrong byte is used, no request waits for long, nothing stays held."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcache.faulty_tier import FaultyTier, TierFaults
from tests.kvcache.instance import BLOCK_SIZE, Instance
from tests.kvcache.local_server import LocalServer, serving_here
from tests.kvcache.memory_tier import MemoryTier
from tests.kvcache.places import BLOCK_BYTES, key
from tests.poll import until

ARENA_BYTES = 32 * BLOCK_BYTES
PROMPT = (1, 2, 3)


class Stage:
    """A tier that may be told to fail, a server over it, and an instance."""

    def __init__(self, server: LocalServer, tier: FaultyTier, kept: MemoryTier) -> None:
        self.server = server
        self.tier = tier
        self.kept = kept
        self.instance = Instance(server.socket)
        self.blocks = [self.instance.engine.fill(index, number) for index, number in enumerate(PROMPT)]

    def store(self, request: str = "store") -> None:
        """Computes PROMPT and waits until the arena has it."""
        self.instance.arrive(request, PROMPT)
        self.instance.compute(request, PROMPT, 3)
        self.instance.finish(request)

    def only_below(self) -> None:
        """PROMPT is stored; then the arena is filled with other blocks until only the tier below has it."""
        budget_s, self.instance.reader._desk.budget_s = (
            self.instance.reader._desk.budget_s,
            5.0,
        )  # also on a busy machine
        self.store()
        until(lambda: len(self.kept.kept) == len(PROMPT), what="the blocks below")
        for number in range(100, 100 + ARENA_BYTES // BLOCK_BYTES):
            self.instance.arrive(f"fill{number}", (number,))
            self.instance.compute(f"fill{number}", (number,), 1)
            self.instance.finish(f"fill{number}")
            until(lambda number=number: key(number) in self.kept.kept, what="the block below")  # type: ignore[misc]
        self.kept.delete([key(number) for number in range(100, 200)])
        self.instance.reader._desk.budget_s = budget_s

    def wanted(self, request: str) -> int:
        """Asks for PROMPT; returns the tokens that may be loaded."""
        return self.instance.arrive(request, PROMPT)

    def load(self, request: str, num_blocks: int) -> list[bytes]:
        """Loads into other blocks than those that hold PROMPT already."""
        ids = list(range(8, 8 + num_blocks))
        loaded = self.instance.load(request, num_blocks * BLOCK_SIZE, ids)
        assert loaded.why == "", loaded
        return [self.instance.engine.block(block_id) for block_id in ids]

    def settled(self) -> bool:
        """Nothing is held in the arena."""
        figures = self.server.figures()
        return figures["reserved_bytes"] + figures["cooling_bytes"] == 0


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    kept = MemoryTier()
    tier = FaultyTier(kept, TierFaults())
    with serving_here(tmp_path, ARENA_BYTES, tier) as server:
        made = Stage(server, tier, kept)
        yield made
        until(made.settled, what="every place to come back")
        made.instance.close()


def test_without_a_fault_blocks_come_up(stage: Stage) -> None:
    stage.only_below()
    assert stage.wanted("again") == 3 * BLOCK_SIZE
    assert stage.load("again", 3) == stage.blocks


def test_a_bit_that_flips_between_the_tier_and_the_arena_is_no_hit_and_is_forgotten_everywhere(stage: Stage) -> None:
    stage.only_below()
    stage.tier.faults = TierFaults(flip_every=2)
    assert stage.wanted("again") == 3 * BLOCK_SIZE, "the tier's seal was right"
    loaded = stage.instance.load("again", 3 * BLOCK_SIZE, [8, 9, 10])
    assert "differs" in loaded.why
    until(lambda: key(2) not in stage.kept.kept, what="the tier to forget it")
    assert stage.wanted("third") == BLOCK_SIZE
    stage.instance.finish("third")


def test_a_tier_that_takes_nothing_costs_nothing_but_its_blocks(stage: Stage) -> None:
    stage.tier.faults = TierFaults(full=True)
    stage.store()
    until(lambda: stage.server.figures()["memory_dropped"] == len(PROMPT), what="three blocks that were not taken")
    assert stage.wanted("again") == 3 * BLOCK_SIZE, "the arena has them"
    stage.instance.finish("again")


def test_a_hanging_tier_delays_a_look_up_by_its_budget_and_is_bypassed(stage: Stage) -> None:
    stage.only_below()
    stage.tier.faults = TierFaults(hang_s=60.0)
    waits = []
    for number in range(6):
        begun_s = time.monotonic()
        assert stage.wanted(f"r{number}") == 0
        waits.append(time.monotonic() - begun_s)
        stage.instance.finish(f"r{number}")
        stage.instance.step()
    assert max(waits) < 1.0
    until(lambda: stage.server.figures()["memory_bypassed"] == 1, what="the breaker")


def test_blocks_that_come_too_late_for_their_request_are_given_back(stage: Stage) -> None:
    """The arena has the first block; the others would take longer than computing them. The first is used, and when the
    others have come they are there for the next request."""
    stage.only_below()
    instance = stage.instance
    assert instance.arrive("first", PROMPT[:1]) == BLOCK_SIZE
    instance.finish("first")
    instance.reader.pace.computed(1000, 0.001)
    instance.reader._desk.budget_s = 0.3
    stage.tier.faults = TierFaults(delay_s=0.2)
    assert instance.arrive("late", PROMPT) == BLOCK_SIZE
    assert stage.load("late", 1) == stage.blocks[:1]
    instance.finish("late")
    until(lambda: not instance.client._nobodys, what="the late answer, or word that none will come")
    stage.tier.faults = TierFaults()
    instance.reader.pace.computed(1000, 1000.0)
    assert stage.wanted("next") == 3 * BLOCK_SIZE
    instance.finish("next")
