"""Any tier, made unreliable on purpose: slow, hanging, failing, full, forgetful, or wrong by a bit.

Memory model: as the wrapped tier; a flip changes one bit of the memory that `get` was given, never what is stored.
Threading: any method from any thread. Operations (contains, get, put, delete), gets that gave a block, and puts are
counted from 1 over all threads. Whoever waits in a delay or a hang goes on at once when the tier is closed.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import msgspec

from kvcache.keys import BlockKey
from kvcache.tier import Tier, TierError, TierFigures


class TierFaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What goes wrong. Nothing does by default; every 0 is never.

    delay_s: every operation takes so many seconds longer.
    hang_s: every operation waits so many seconds, and then raises TierError.
    fail_every: every n-th operation raises TierError and does nothing.
    flip_every: every n-th get that gives a block flips the lowest bit of its middle byte. The wrapped tier has verified
        the bytes before, so only the arena's digest finds it out.
    drop_every: every n-th put keeps nothing and says nothing.
    full: every put raises TierError.
    """

    delay_s: float = 0.0
    hang_s: float = 0.0
    fail_every: int = 0
    flip_every: int = 0
    drop_every: int = 0
    full: bool = False


class FaultyTier:
    """Wraps a tier. See kvcache/tier.py. `faults` may be replaced at any time."""

    def __init__(self, inner: Tier, faults: TierFaults) -> None:
        self.name = inner.name
        self.is_written = inner.is_written
        self.inner = inner
        self.faults = faults
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._num_operations = 0
        self._num_found = 0
        self._num_puts = 0

    def contains(self, keys: Sequence[BlockKey]) -> int:
        self._meet_faults()
        return self.inner.contains(keys)

    def get(self, key: BlockKey, into: memoryview) -> int | None:
        self._meet_faults()
        digest = self.inner.get(key, into)
        if digest is None:
            return None
        with self._lock:
            self._num_found += 1
            flips = _is_due(self._num_found, self.faults.flip_every)
        if flips and len(into):
            into[len(into) // 2] ^= 1
        return digest

    def put(self, key: BlockKey, digest: int, block: memoryview) -> bool:
        self._meet_faults()
        with self._lock:
            self._num_puts += 1
            drops = _is_due(self._num_puts, self.faults.drop_every)
        if self.faults.full:
            raise TierError("full by a fault")
        return drops or self.inner.put(key, digest, block)

    def delete(self, keys: Sequence[BlockKey]) -> None:
        self._meet_faults()
        self.inner.delete(keys)

    def figures(self) -> TierFigures:
        return self.inner.figures()

    def close(self) -> None:
        """Ends every delay and hang, then closes the wrapped tier."""
        self._closed.set()
        self.inner.close()

    def _meet_faults(self) -> None:
        """Delays, hangs and failures. Raises TierError."""
        faults = self.faults
        with self._lock:
            self._num_operations += 1
            fails = _is_due(self._num_operations, faults.fail_every)
        if faults.delay_s:
            self._closed.wait(faults.delay_s)
        if faults.hang_s:
            self._closed.wait(faults.hang_s)
            raise TierError("no answer by a fault")
        if fails:
            raise TierError("failed by a fault")


def _is_due(number: int, every: int) -> bool:
    return every > 0 and number % every == 0
