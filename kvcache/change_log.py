"""What became findable in an index and what did not any more, in order, for readers that each keep their position.

    index ── add ──▶ | oldest ... newest |        reader: since(position) ──▶ changes, new position

Memory model: at most MAX_CHANGES changes; a reader that is further behind must begin with everything again.
Threading: the server's event loop.
"""

from __future__ import annotations

from typing import NamedTuple

from kvcache.keys import BlockKey

MAX_CHANGES = 1 << 16


class Change(NamedTuple):
    """A block that can be found from now on, or cannot."""

    key: BlockKey
    is_there: bool


class ChangeLog:
    """The latest changes; positions count from the beginning."""

    def __init__(self, max_changes: int = MAX_CHANGES) -> None:
        self._max_changes = max_changes
        self._changes: list[Change] = []
        self._first = 0

    @property
    def end(self) -> int:
        """The position behind the newest change."""
        return self._first + len(self._changes)

    def add(self, key: BlockKey, is_there: bool) -> None:
        """Keeps the newest half when it is full."""
        self._changes.append(Change(key, is_there))
        if len(self._changes) > self._max_changes:
            num_forgotten = len(self._changes) - self._max_changes // 2
            self._first += num_forgotten
            del self._changes[:num_forgotten]

    def since(self, position: int, most: int) -> list[Change] | None:
        """At most so many changes from a position on; None if some of them are forgotten."""
        if position < self._first:
            return None
        start = position - self._first
        return self._changes[start : start + most]
