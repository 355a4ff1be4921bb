"""How often the same thing is logged: what strangers cause must not fill a disk.

Memory model: a few hundred texts. Threading: its owner's thread.
"""

from __future__ import annotations

import time

MAX_TEXTS = 256


class Seldom:
    """The same text is due at most once per interval."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._last_s: dict[str, float] = {}

    def is_due(self, what: str) -> bool:
        now_s = time.monotonic()
        if now_s - self._last_s.get(what, -self._interval_s) < self._interval_s:
            return False
        if len(self._last_s) >= MAX_TEXTS:
            self._last_s.clear()
        self._last_s[what] = now_s
        return True
