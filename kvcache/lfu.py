"""Least frequently used first, with dynamic ageing.

    rank = how often a block was used + the rank of the last victim when it was used last

So what was used often long ago is overtaken by what is used now. Of equal ranks the least recently used goes first, and
of one chain the end.

Memory model: a heap of (rank, turn, key) whose outdated entries are dropped when they come up, or all at once when they
are more than the others.
Threading: none of its own.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvcache.keys import BlockKey

_FEW = 64
"""Outdated entries that are never worth a new heap."""


class _Place(NamedTuple):
    """Where a block stands: uses since it was admitted, its rank, and the turn in which it got it."""

    uses: int
    rank: int
    turn: int


class Lfu:
    """See kvcache/policy.py."""

    def __init__(self) -> None:
        self._places: dict[BlockKey, _Place] = {}
        self._heap: list[tuple[int, int, BlockKey]] = []
        self._age = 0
        self._turn = 0

    def admitted(self, key: BlockKey) -> None:
        self._put(key, 0, self._age)

    def touched(self, keys: Sequence[BlockKey]) -> None:
        for key in reversed(keys):
            place = self._places.get(key)
            if place is not None:
                self._put(key, place.uses, place.rank)

    def used(self, keys: Sequence[BlockKey]) -> None:
        for key in reversed(keys):
            place = self._places.get(key)
            if place is not None:
                self._put(key, place.uses + 1, place.uses + 1 + self._age)

    def removed(self, key: BlockKey) -> None:
        self._places.pop(key, None)
        self._tidy()

    def victim(self, may_go: Callable[[BlockKey], bool]) -> BlockKey | None:
        passed = []
        victim = None
        while self._heap and victim is None:
            item = heapq.heappop(self._heap)
            rank, turn, key = item
            place = self._places.get(key)
            if place is None or place.turn != turn:
                continue
            if may_go(key):
                self._age = max(self._age, rank)
                del self._places[key]
                victim = key
            else:
                passed.append(item)
        for item in passed:
            heapq.heappush(self._heap, item)
        return victim

    def _put(self, key: BlockKey, uses: int, rank: int) -> None:
        self._turn += 1
        self._places[key] = _Place(uses, rank, self._turn)
        heapq.heappush(self._heap, (rank, self._turn, key))
        self._tidy()

    def _tidy(self) -> None:
        if len(self._heap) > 2 * len(self._places) + _FEW:
            self._heap = [(place.rank, place.turn, key) for key, place in self._places.items()]
            heapq.heapify(self._heap)
