"""The complete blocks of an arena, found by key.

Memory model: keys and entries only.
Threading: the server's event loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from core.clock import Clock
from kvcache.counts import Usage
from kvcache.entry import Entry
from kvcache.keys import BlockKey
from kvcache.leaving import Leaving
from kvcache.ranges import aligned
from kvcache.rules import Rules


class CompleteBlocks:
    """By key. on_change: is told of each block that can be found from now on, and of each that cannot any more. usage:
    where their bytes are counted. leaving: who goes next, and who is kept."""

    def __init__(self, rules: Rules, usage: Usage, clock: Clock) -> None:
        self.on_change: Callable[[BlockKey, bool], None] = lambda key, is_there: None
        self._usage = usage
        self._all: dict[BlockKey, Entry] = {}
        self.leaving = Leaving(self._all, rules, usage, clock)
        self._partials: Counter[BlockKey] = Counter()

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._all

    def keys(self) -> list[BlockKey]:
        """Of all of them."""
        return list(self._all)

    def entries(self) -> list[Entry]:
        """All of them, the oldest first."""
        return list(self._all.values())

    def get(self, key: BlockKey) -> Entry | None:
        """One block, without pinning it."""
        return self._all.get(key)

    def of(self, keys: Iterable[BlockKey]) -> list[Entry]:
        """Those of the keys that are here."""
        return [entry for key in keys if (entry := self._all.get(key)) is not None]

    def add(self, entry: Entry) -> None:
        """It is found from now on."""
        self._all[entry.key] = entry
        self._usage.ready += aligned(entry.num_bytes)
        self.leaving.added(entry)
        if entry.before:
            self._partials[entry.before] += 1
        self.on_change(entry.key, True)

    def remove(self, entry: Entry) -> None:
        """It is not found any more."""
        del self._all[entry.key]
        self.leaving.removed(entry)
        self._usage.ready -= aligned(entry.num_bytes)
        if entry.before:
            self._partials[entry.before] -= 1
            if not self._partials[entry.before]:
                del self._partials[entry.before]
        self.on_change(entry.key, False)

    def has_partial(self, before: BlockKey) -> bool:
        """Whether a partial block follows this one."""
        return self._partials[before] > 0
