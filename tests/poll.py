"""Waiting in tests: poll with a bound, never sleep and hope."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T], timeout_s: float = 20.0, what: str = "") -> T:
    """The first true value of `condition`; raises AssertionError after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline_s, f"waited {timeout_s} s in vain for {what or condition}"
        time.sleep(0.02)
