"""A tier in a dictionary: a small real one, for tests of what is built on tiers."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import msgspec

from kvcache.keys import BlockKey
from kvcache.tier import TierFigures, seal


class Kept(msgspec.Struct, frozen=True):
    """A block as it is kept."""

    digest: int
    sealed: int
    block: bytes


class MemoryTier:
    """See kvcache/tier.py. `kept` is there for a test to look at and to damage; it has no bound."""

    name = "memory"
    is_written = True

    def __init__(self) -> None:
        self.kept: dict[BlockKey, Kept] = {}
        self._corrupt = 0
        self._lock = threading.Lock()

    def contains(self, keys: Sequence[BlockKey]) -> int:
        with self._lock:
            return next((at for at, key in enumerate(keys) if key not in self.kept), len(keys))

    def get(self, key: BlockKey, into: memoryview) -> int | None:
        with self._lock:
            kept = self.kept.get(key)
            if kept is None:
                return None
            if len(kept.block) != len(into) or seal(key, kept.digest, kept.block) != kept.sealed:
                del self.kept[key]
                self._corrupt += 1
                return None
        into[:] = kept.block
        return kept.digest

    def put(self, key: BlockKey, digest: int, block: memoryview) -> bool:
        with self._lock:
            if key not in self.kept:
                self.kept[key] = Kept(digest, seal(key, digest, block), bytes(block))
        return True

    def delete(self, keys: Sequence[BlockKey]) -> None:
        with self._lock:
            for key in keys:
                self.kept.pop(key, None)

    def figures(self) -> TierFigures:
        with self._lock:
            num_bytes = sum(len(kept.block) for kept in self.kept.values())
            return TierFigures(blocks=len(self.kept), num_bytes=num_bytes, corrupt=self._corrupt)

    def close(self) -> None:
        """Nothing to do: a test may look at `kept` afterwards."""
