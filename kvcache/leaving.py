"""Which complete blocks of an arena go, and when; those that labels keep do not.

    added ──▶ in the order ── victim ──▶ removed, or set aside and put back
                  └─ kept by a label: out of the order until it is let go

Memory model: keys only; the entries are `CompleteBlocks`'.
Threading: the server's event loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from core.clock import Clock
from kvcache.counts import Usage
from kvcache.entry import Entry
from kvcache.keys import BlockKey
from kvcache.order import Order
from kvcache.ranges import aligned
from kvcache.rules import Rules


class Leaving:
    """Of the blocks in `blocks`. usage: where the bytes that are kept are counted."""

    def __init__(self, blocks: Mapping[BlockKey, Entry], rules: Rules, usage: Usage, clock: Clock) -> None:
        self._blocks = blocks
        self._usage = usage
        self._order = Order(rules, clock)
        self._kept: set[BlockKey] = set()

    def added(self, entry: Entry) -> None:
        """A block is complete from now on."""
        if entry.key in self._kept:
            self._usage.pinned += aligned(entry.num_bytes)
        else:
            self._order.admitted(entry.key, entry.tenant)

    def removed(self, entry: Entry) -> None:
        """A block is gone; if it comes again, it is kept as it was."""
        self._order.removed(entry.key)
        self._usage.pinned -= aligned(entry.num_bytes) if entry.key in self._kept else 0

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """A chain of blocks is recent, and its end goes before its beginning, which others may share."""
        self._order.touched(keys)

    def use(self, keys: Sequence[BlockKey]) -> None:
        """A request asked for a chain of blocks and got it: counts where the policy counts uses."""
        self._order.used(keys)

    def keep(self, keys: Sequence[BlockKey]) -> None:
        """These are not evicted, now or when they are complete, until they are let go. None of them is kept yet."""
        self._kept.update(keys)
        for entry in self._here(keys):
            self._order.removed(entry.key)
            self._usage.pinned += aligned(entry.num_bytes)

    def let_go(self, keys: Sequence[BlockKey]) -> None:
        """The end of `keep`; they are all kept."""
        self._kept.difference_update(keys)
        for entry in reversed(self._here(keys)):
            self._order.admitted(entry.key, entry.tenant)
            self._usage.pinned -= aligned(entry.num_bytes)

    def is_kept(self, key: BlockKey) -> bool:
        """By a label."""
        return key in self._kept

    def victim(self) -> Entry | None:
        """The block that goes next; it is out of the order. None if none may go."""
        key = self._order.victim(self._may_go)
        return self._blocks[key] if key is not None else None

    def victim_of(self, tenant: bytes) -> Entry | None:
        """The same among one tenant's blocks; only with a quota."""
        key = self._order.victim_of(tenant, self._may_go)
        return self._blocks[key] if key is not None else None

    def idle(self) -> list[Entry]:
        """Those that may go and were not used for the rules' time."""
        return [self._blocks[key] for key in self._order.idle() if self._may_go(key)]

    def set_aside(self, entry: Entry) -> None:
        """It will leave: out of the order until it is removed or put back."""
        self._order.removed(entry.key)

    def put_back(self, entry: Entry) -> None:
        """It stays after all."""
        self._order.removed(entry.key)
        self._order.admitted(entry.key, entry.tenant)

    def _here(self, keys: Sequence[BlockKey]) -> list[Entry]:
        return [self._blocks[key] for key in keys if key in self._blocks]

    def _may_go(self, key: BlockKey) -> bool:
        return self._blocks[key].pins == 0
