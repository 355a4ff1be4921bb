"""The faults that other tests rely on, and the small tier they are put around."""

from __future__ import annotations

import threading
import time

import pytest

from kvcache.conformance import block_of, check_tier, key_of, read
from kvcache.faulty_tier import FaultyTier, TierFaults
from kvcache.tier import Tier, TierError
from tests.kvcache.memory_tier import Kept, MemoryTier

BLOCK = block_of(1)


def put(tier: Tier, number: int) -> None:
    tier.put(key_of(number), number, memoryview(BLOCK))


def test_the_memory_tier_is_a_tier() -> None:
    check_tier(MemoryTier)


def test_the_memory_tier_gives_nothing_damaged() -> None:
    tier = MemoryTier()
    put(tier, 1)
    kept = tier.kept[key_of(1)]
    tier.kept[key_of(1)] = Kept(kept.digest, kept.sealed, BLOCK[:-1] + bytes([BLOCK[-1] ^ 1]))
    assert read(tier, 1)[0] is None
    assert not tier.kept
    assert tier.figures().corrupt == 1


def test_without_faults_it_is_the_wrapped_tier() -> None:
    check_tier(lambda: FaultyTier(MemoryTier(), TierFaults()))


def test_a_slow_tier_is_still_a_tier() -> None:
    check_tier(lambda: FaultyTier(MemoryTier(), TierFaults(delay_s=0.002)))


def test_every_operation_is_delayed() -> None:
    tier = FaultyTier(MemoryTier(), TierFaults(delay_s=0.02))
    begin_s = time.monotonic()
    put(tier, 1)
    assert tier.contains([key_of(1)]) == 1
    assert read(tier, 1) == (1, BLOCK)
    tier.delete([key_of(1)])
    assert time.monotonic() - begin_s >= 4 * 0.02


def test_a_hang_ends_in_an_error() -> None:
    tier = FaultyTier(MemoryTier(), TierFaults(hang_s=0.05))
    begin_s = time.monotonic()
    with pytest.raises(TierError, match="no answer"):
        put(tier, 1)
    assert time.monotonic() - begin_s >= 0.05


def test_closing_ends_a_hang() -> None:
    tier = FaultyTier(MemoryTier(), TierFaults(hang_s=3600))
    errors: list[TierError] = []

    def hang() -> None:
        try:
            tier.contains([key_of(1)])
        except TierError as error:
            errors.append(error)

    thread = threading.Thread(target=hang)
    thread.start()
    tier.close()
    thread.join(timeout=10)
    assert len(errors) == 1


def test_every_nth_operation_fails_and_does_nothing() -> None:
    inner = MemoryTier()
    tier = FaultyTier(inner, TierFaults(fail_every=3))
    failed = []
    for number in range(1, 10):
        try:
            put(tier, number)
        except TierError:
            failed.append(number)
    assert failed == [3, 6, 9]
    assert set(inner.kept) == {key_of(number) for number in (1, 2, 4, 5, 7, 8)}


def test_every_nth_found_block_differs_in_one_bit() -> None:
    inner = MemoryTier()
    tier = FaultyTier(inner, TierFaults(flip_every=2))
    put(tier, 1)
    assert read(tier, 99)[0] is None, "a miss counts for nothing"
    for flipped_bits in (0, 1, 0, 1):
        digest, block = read(tier, 1)
        assert digest == 1
        assert sum((a ^ b).bit_count() for a, b in zip(block, BLOCK, strict=True)) == flipped_bits
    assert read(inner, 1) == (1, BLOCK), "what is stored stays whole"


def test_every_nth_put_is_dropped_in_silence() -> None:
    tier = FaultyTier(MemoryTier(), TierFaults(drop_every=2))
    for number in range(1, 6):
        put(tier, number)
    assert [number for number in range(1, 6) if read(tier, number)[0] is None] == [2, 4]


def test_a_full_tier_refuses_puts_and_gives_what_it_has() -> None:
    tier = FaultyTier(MemoryTier(), TierFaults())
    put(tier, 1)
    tier.faults = TierFaults(full=True)
    with pytest.raises(TierError, match="full"):
        put(tier, 2)
    assert read(tier, 1) == (1, BLOCK)
    tier.faults = TierFaults()
    put(tier, 2)
