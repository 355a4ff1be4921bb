"""Keeps requests from waiting, one after another, for something that has stopped to answer.

    CLOSED ── `failures` in a row ──▶ OPEN ── after pause_s, one may try ──▶ CLOSED if it was answered

Threading: any; a lock of its own.
"""

from __future__ import annotations

import threading

from core.clock import Clock

FAILURES = 3
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0


class Breaker:
    """Counts failures in a row; the pause doubles with every failed try."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._open_until_s = 0.0

    @property
    def is_open(self) -> bool:
        return self._failures >= FAILURES

    def allows(self) -> bool:
        """Whether to try now. Of an open breaker, one try per pause."""
        with self._lock:
            if not self.is_open:
                return True
            now_s = self._clock.monotonic_s()
            if now_s < self._open_until_s:
                return False
            self._open_until_s = now_s + self._pause_s
            return True

    def good(self) -> None:
        """It has answered, if late."""
        with self._lock:
            self._failures, self._pause_s = 0, FIRST_PAUSE_S

    def bad(self) -> None:
        """It has not."""
        with self._lock:
            self._failures += 1
            if self.is_open:
                self._open_until_s = self._clock.monotonic_s() + self._pause_s
                self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)
