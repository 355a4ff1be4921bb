"""`check_tier`: what every tier must do, for its own tests and for those of a tier that somebody else wrote.
`check_source`: the same for one that is only read."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from kvcache.keys import KEY_BYTES, BlockKey
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
    finally:
        tier.close()


def check_source(make: Callable[[], Tier], fill: Callable[[BlockKey, int, bytes], None]) -> None:
    """Raises AssertionError where a tier that is not written breaks the contract. `fill(key, digest, block)` gives a
    block to what such a tier reads from, which must hold at least 32 of BLOCK_BYTES bytes and begin empty, and returns
    when the tier can know of it."""
    tier = make()
    try:
        assert not tier.is_written, "a tier that is written passes check_tier"
        _takes_nothing(tier)
        _gives_what_the_source_has(tier, fill)
        _reads_many_at_once(tier, fill)
        tier.delete([key_of(1), key_of(99)])
    finally:
        tier.close()
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


def _takes_nothing(tier: Tier) -> None:
    assert not tier.put(key_of(1), 1, memoryview(block_of(1)))
    assert tier.contains([key_of(1)]) == 0
    assert read(tier, 1)[0] is None


def _gives_what_the_source_has(tier: Tier, fill: Callable[[BlockKey, int, bytes], None]) -> None:
    blocks = {number: block_of(number) for number in (1, 2, 3, 5)}
    for number, block in blocks.items():
        fill(key_of(number), 2**64 - number, block)
    assert tier.contains([key_of(n) for n in (1, 2, 3, 4, 5)]) == 3
    assert tier.contains([key_of(n) for n in (4, 5)]) == 0
    assert tier.contains([]) == 0
    for number, block in blocks.items():
        assert read(tier, number) == (2**64 - number, block)
    assert read(tier, 4)[0] is None
    assert tier.figures().blocks == len(blocks)
    assert read(tier, 1, BLOCK_BYTES - 1)[0] is None, "another size"


def _survives_many_at_once(tier: Tier) -> None:
    blocks = {number: block_of(number) for number in range(10, 26)}

    def put(number: int) -> None:
        tier.put(key_of(number), number, memoryview(blocks[number]))

    with ThreadPoolExecutor(_NUM_PARALLEL) as pool:
        list(pool.map(put, [*blocks, *blocks]))
        found = list(pool.map(lambda number: (number, read(tier, number)), blocks))
    for number, (digest, block) in found:
        assert (digest, block) == (number, blocks[number]), f"block {number}"


def _reads_many_at_once(tier: Tier, fill: Callable[[BlockKey, int, bytes], None]) -> None:
    blocks = {number: block_of(number) for number in range(10, 26)}
    for number, block in blocks.items():
        fill(key_of(number), number, block)
    with ThreadPoolExecutor(_NUM_PARALLEL) as pool:
        found = list(pool.map(lambda number: (number, read(tier, number)), [*blocks, *blocks]))
    for number, (digest, block) in found:
        assert (digest, block) == (number, blocks[number]), f"block {number}"
