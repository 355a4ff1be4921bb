"""Which blocks nobody has used for how long.

Memory model: one key and one time per block that is watched.
Threading: the server's event loop. Times are the clock's `monotonic_s`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from core.clock import Clock
from kvcache.keys import BlockKey


class Idle:
    """Watches blocks; those that were not used for `ttl_s` are `over`. With ttl_s 0 it watches none."""

    def __init__(self, ttl_s: float, clock: Clock) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        self._used_s: OrderedDict[BlockKey, float] = OrderedDict()

    def admitted(self, key: BlockKey) -> None:
        """From now on."""
        if self._ttl_s:
            self._used_s[key] = self._clock.monotonic_s()

    def touched(self, keys: Sequence[BlockKey]) -> None:
        """They were used; those that are not watched are passed over."""
        if not self._ttl_s:
            return
        now_s = self._clock.monotonic_s()
        for key in keys:
            if key in self._used_s:
                self._used_s[key] = now_s
                self._used_s.move_to_end(key)

    def removed(self, key: BlockKey) -> None:
        """Not any more."""
        self._used_s.pop(key, None)

    def over(self) -> list[BlockKey]:
        """Those that were not used for so long; they stay watched."""
        last_s = self._clock.monotonic_s() - self._ttl_s
        keys = []
        for key, used_s in self._used_s.items():
            if used_s > last_s:
                break
            keys.append(key)
        return keys
