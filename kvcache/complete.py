"""The complete blocks of an arena: found by key, in the order in which they go, some kept by labels.

    added ──▶ in the order ── victim ──▶ removed, or set aside and put back
                  └─ kept by a label: out of the order until it is let go

Memory model: keys and entries only.
Threading: the server's event loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from core.clock import Clock
from kvcache.counts import Usage
from kvcache.entry import Entry
from kvcache.keys import BlockKey
from kvcache.order import Order
from kvcache.ranges import aligned
from kvcache.rules import Rules


class CompleteBlocks:
    """By key. on_change: is told of each block that can be found from now on, and of each that cannot any more. usage:
    where their bytes are counted."""

    def __init__(self, rules: Rules, usage: Usage, clock: Clock) -> None:
        self.on_change: Callable[[BlockKey, bool], None] = lambda key, is_there: None
        self._usage = usage
        self._all: dict[BlockKey, Entry] = {}
        self._order = Order(rules, clock)
        self._kept: set[BlockKey] = set()
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
        if entry.key in self._kept:
            self._usage.pinned += aligned(entry.num_bytes)
        else:
            self._order.admitted(entry.key, entry.tenant)
        if entry.before:
            self._partials[entry.before] += 1
        self.on_change(entry.key, True)

    def remove(self, entry: Entry) -> None:
        """It is not found any more."""
        del self._all[entry.key]
        self._order.removed(entry.key)
        self._usage.ready -= aligned(entry.num_bytes)
        self._usage.pinned -= aligned(entry.num_bytes) if entry.key in self._kept else 0
        if entry.before:
            self._partials[entry.before] -= 1
            if not self._partials[entry.before]:
                del self._partials[entry.before]
        self.on_change(entry.key, False)

    def has_partial(self, before: BlockKey) -> bool:
        """Whether a partial block follows this one."""
        return self._partials[before] > 0

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """A chain of blocks is recent, and its end goes before its beginning, which others may share."""
        self._order.touched(keys)

    def use(self, keys: Sequence[BlockKey]) -> None:
        """A request asked for a chain of blocks and got it: counts where the policy counts uses."""
        self._order.used(keys)

    def keep(self, keys: Sequence[BlockKey]) -> None:
        """These are not evicted, now or when they are complete, until they are let go. None of them is kept yet."""
        self._kept.update(keys)
        for entry in self.of(keys):
            self._order.removed(entry.key)
            self._usage.pinned += aligned(entry.num_bytes)

    def let_go(self, keys: Sequence[BlockKey]) -> None:
        """The end of `keep`; they are all kept."""
        self._kept.difference_update(keys)
        for entry in self.of(reversed(keys)):
            self._order.admitted(entry.key, entry.tenant)
            self._usage.pinned -= aligned(entry.num_bytes)

    def is_kept(self, key: BlockKey) -> bool:
        """By a label."""
        return key in self._kept

    def victim(self) -> Entry | None:
        """The block that goes next; it is out of the order. None if none may go."""
        key = self._order.victim(self._may_go)
        return self._all[key] if key is not None else None

    def victim_of(self, tenant: bytes) -> Entry | None:
        """The same among one tenant's blocks; only with a quota."""
        key = self._order.victim_of(tenant, self._may_go)
        return self._all[key] if key is not None else None

    def idle(self) -> list[Entry]:
        """Those that may go and were not used for the rules' time."""
        return [self._all[key] for key in self._order.idle() if self._may_go(key)]

    def set_aside(self, entry: Entry) -> None:
        """It will leave: out of the order until it is removed or put back."""
        self._order.removed(entry.key)

    def put_back(self, entry: Entry) -> None:
        """It stays after all."""
        self._order.removed(entry.key)
        self._order.admitted(entry.key, entry.tenant)

    def _may_go(self, key: BlockKey) -> bool:
        return self._all[key].pins == 0
