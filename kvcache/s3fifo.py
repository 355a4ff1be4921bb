"""Three queues: what is new must be used again while it passes through a small one to stay.

    admitted ──▶ small (a tenth) ── was used ──▶ main ── was used ──▶ main again, one use less
                    └─ was not ──▶ ghost            └─ was not ──▶ gone
    admitted and its key still in ghost ──▶ main       (it left too early)

A long scan goes through the small queue alone. As described in "FIFO queues are all you need for cache eviction"
(Yang et al., SOSP 2023).

Memory model: keys only; ghost remembers at most as many keys as there are blocks.
Threading: none of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from kvcache.keys import BlockKey

SMALL_SHARE = 0.1
MOST_USES = 3
"""More uses than these are not counted, so that a block of the main queue leaves after as many turns."""

GHOSTS_AT_LEAST = 16


class S3Fifo:
    """See kvcache/policy.py."""

    def __init__(self) -> None:
        self._small: OrderedDict[BlockKey, int] = OrderedDict()
        self._main: OrderedDict[BlockKey, int] = OrderedDict()
        self._ghost: OrderedDict[BlockKey, None] = OrderedDict()

    def admitted(self, key: BlockKey) -> None:
        if key in self._ghost:
            del self._ghost[key]
            self._main[key] = 0
        else:
            self._small[key] = 0

    def touched(self, keys: Sequence[BlockKey]) -> None:
        """Nothing changes: only uses count."""

    def used(self, keys: Sequence[BlockKey]) -> None:
        for key in keys:
            for queue in (self._small, self._main):
                if key in queue:
                    queue[key] = min(queue[key] + 1, MOST_USES)

    def removed(self, key: BlockKey) -> None:
        self._small.pop(key, None)
        self._main.pop(key, None)

    def victim(self, may_go: Callable[[BlockKey], bool]) -> BlockKey | None:
        is_large = len(self._small) >= SMALL_SHARE * (len(self._small) + len(self._main))
        turns = (self._from_small, self._from_main) if is_large else (self._from_main, self._from_small)
        for turn in (*turns, self._from_main):  # what the small queue has just moved on may go after all
            key = turn(may_go)
            if key is not None:
                return key
        return None

    def _from_small(self, may_go: Callable[[BlockKey], bool]) -> BlockKey | None:
        for _ in range(len(self._small)):
            key, uses = next(iter(self._small.items()))
            if uses:
                del self._small[key]
                self._main[key] = 0
            elif may_go(key):
                del self._small[key]
                self._remember(key)
                return key
            else:
                self._small.move_to_end(key)
        return None

    def _from_main(self, may_go: Callable[[BlockKey], bool]) -> BlockKey | None:
        for _ in range(len(self._main) * (MOST_USES + 1)):
            key, uses = next(iter(self._main.items()))
            if may_go(key):
                if not uses:
                    del self._main[key]
                    return key
                self._main[key] = uses - 1
            self._main.move_to_end(key)
        return None

    def _remember(self, key: BlockKey) -> None:
        self._ghost[key] = None
        most = max(len(self._small) + len(self._main), GHOSTS_AT_LEAST)
        while len(self._ghost) > most:
            self._ghost.popitem(last=False)
