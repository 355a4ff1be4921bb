"""What every tier below the arena does: keep blocks by key, give back exactly what it was given, or nothing.

    put:  key, the arena's digest, bytes ──▶ sealed (checksum over all of it) ──▶ the tier's store
    get:  the tier's store ──▶ bytes into place ──▶ checksum compared ──▶ the digest, or a miss

Memory model: `get` writes into memory of the caller's (a place in the arena that nobody can find yet), `put` reads such
memory during the call and keeps no reference.
Threading: every method may be called from several threads at once and may wait for a device or a peer; whoever calls
bounds the wait. A tier never raises anything but TierError, which means that it is not well; a miss is no error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec
import xxhash

from core.errors import BatonError
from kvcache.keys import BlockKey


class TierError(BatonError):
    """A tier cannot do what it is there for: no space, no connection, no answer."""


class TierFigures(msgspec.Struct, frozen=True):
    """What a tier holds and did. corrupt: blocks that failed their checksum and were removed. more: what only this kind
    of tier has to say, by name."""

    blocks: int = 0
    num_bytes: int = 0
    evicted: int = 0
    corrupt: int = 0
    more: dict[str, float] = {}


class Tier(Protocol):
    """A place that keeps blocks after the arena has forgotten them. is_written: whether it takes blocks at all; into
    one that does not, nothing is put."""

    name: str
    is_written: bool

    def contains(self, keys: Sequence[BlockKey]) -> int:
        """How many of the first keys are there, without a gap. May be wrong: `get` decides."""
        ...

    def get(self, key: BlockKey, into: memoryview) -> int | None:
        """Fills `into` and returns the arena's digest that was put with it; None if the block is not there, has
        another size, or is not what was put: then it is gone for good, and `into` holds anything."""
        ...

    def put(self, key: BlockKey, digest: int, block: memoryview) -> bool:
        """Keeps a block: visible whole or not at all. May evict others. A key that is there already stays.
        False if it was not kept: larger than the tier, or somebody is writing it now."""
        ...

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """Forgets blocks; unknown ones are passed over."""
        ...

    def figures(self) -> TierFigures: ...

    def close(self) -> None: ...


def seal(key: BlockKey, digest: int, block: bytes | memoryview) -> int:
    """The checksum that is kept beside a block: xxh3-64 over its bytes, then over key, digest and length."""
    return seal_of(key, digest, len(block), xxhash.xxh3_64_intdigest(block))


def seal_of(key: BlockKey, digest: int, num_bytes: int, body: int) -> int:
    """The same where the bytes' own xxh3-64 is known already."""
    head = key + digest.to_bytes(8, "little") + num_bytes.to_bytes(8, "little") + body.to_bytes(8, "little")
    return xxhash.xxh3_64_intdigest(head)
