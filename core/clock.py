"""Time as an argument: nothing below an entry point asks the operating system what time it is.

Two readings, because they answer different questions: `monotonic_s` measures waits and deadlines inside one
process, `unix_s` stamps moments that another process will compare with its own (request timelines).
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where the time comes from."""

    def monotonic_s(self) -> float: ...

    def unix_s(self) -> float: ...


class SystemClock:
    """The machine's clock."""

    def monotonic_s(self) -> float:
        return time.monotonic()

    def unix_s(self) -> float:
        return time.time()


class ManualClock:
    """A clock that a test moves by hand; both readings advance together."""

    def __init__(self, start_s: float = 1000.0) -> None:
        self._now_s = start_s

    def advance(self, seconds: float) -> None:
        self._now_s += seconds

    def monotonic_s(self) -> float:
        return self._now_s

    def unix_s(self) -> float:
        return self._now_s
