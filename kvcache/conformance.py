"""`check_tier`: what every tier must do, for its own tests and for those of a tier that somebody else wrote."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from kvcache.keys import KEY_BYTES
from kvcache.tier import Tier

BLOCK_BYTES = 40_000
_NUM_PARALLEL = 8


def check_tier(make: Callable[[], Tier]) -> None:
    """Raises AssertionError where a tier made by `make` breaks the contract. The tier must hold at least 32 blocks of
    BLOCK_BYTES bytes and begin empty."""
    tier = make()
    try:
        _gives_back_what_it_was_given(tier)
        _knows_a_prefix(tier)
        _forgets(tier)
        _refuses_another_size(tier)
        _survives_many_at_once(tier)
        _clears(tier)
    finally:
        tier.close()


def block_of(number: int) -> bytes:
    """Bytes that differ from every other number's, of no kind that compresses to nothing."""
    line = number.to_bytes(8, "little") + os.urandom(56)
    return (line * (BLOCK_BYTES // len(line) + 1))[:BLOCK_BYTES]


def key_of(number: int) -> bytes:
    """A key for a number."""
    return number.to_bytes(KEY_BYTES, "big")


def read(tier: Tier, number: int, num_bytes: int = BLOCK_BYTES) -> tuple[int | None, bytes]:
    """(digest or None, bytes) of one get."""
    into = bytearray(num_bytes)
    digest = tier.get(key_of(number), memoryview(into))
    return digest, bytes(into)


def _gives_back_what_it_was_given(tier: Tier) -> None:
    assert read(tier, 1)[0] is None, "an empty tier gives nothing"
    block = block_of(1)
    assert tier.put(key_of(1), 2**64 - 1, memoryview(block)), "there is room"
    assert read(tier, 1) == (2**64 - 1, block)
    assert tier.put(key_of(1), 2**64 - 1, memoryview(block)), "it is there"
    assert read(tier, 1) == (2**64 - 1, block), "putting twice changes nothing"
    assert tier.figures().blocks == 1


def _knows_a_prefix(tier: Tier) -> None:
    for number in (2, 3, 5):
        tier.put(key_of(number), number, memoryview(block_of(number)))
    assert tier.contains([key_of(n) for n in (1, 2, 3, 4, 5)]) == 3
    assert tier.contains([key_of(n) for n in (4, 5)]) == 0
    assert tier.contains([]) == 0


def _forgets(tier: Tier) -> None:
    tier.delete([key_of(2), key_of(99)])
    assert read(tier, 2)[0] is None
    assert tier.contains([key_of(1), key_of(2)]) == 1


def _refuses_another_size(tier: Tier) -> None:
    tier.put(key_of(6), 6, memoryview(block_of(6)))
    assert read(tier, 6, BLOCK_BYTES - 1)[0] is None


def _survives_many_at_once(tier: Tier) -> None:
    blocks = {number: block_of(number) for number in range(10, 26)}

    def put(number: int) -> None:
        tier.put(key_of(number), number, memoryview(blocks[number]))

    with ThreadPoolExecutor(_NUM_PARALLEL) as pool:
        list(pool.map(put, [*blocks, *blocks]))
        found = list(pool.map(lambda number: (number, read(tier, number)), blocks))
    for number, (digest, block) in found:
        assert (digest, block) == (number, blocks[number]), f"block {number}"


def _clears(tier: Tier) -> None:
    tier.put(key_of(30), 30, memoryview(block_of(30)))
    tier.clear()
    assert tier.contains([key_of(30)]) == 0
    assert all(read(tier, number)[0] is None for number in (1, *range(10, 26), 30)), "nothing is left"
    block = block_of(31)
    assert tier.put(key_of(31), 31, memoryview(block)), "a cleared tier goes on"
    assert read(tier, 31) == (31, block)
    tier.clear()
    tier.clear()
    assert tier.contains([key_of(31)]) == 0
