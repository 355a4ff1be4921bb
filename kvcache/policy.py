"""Which complete block of an arena goes next when another needs its room.

    admitted ──▶ in the policy's books ── touched, used ──▶ later in its order
                     ├─ victim ──▶ gone from the books: the caller evicts it, or admits it again
                     └─ removed ──▶ gone: dropped, damaged, or pinned by a label

    lru     the least recently used first; a chain's end before its beginning, which others may share
    fifo    the one that was stored first
    lfu     the least often used first, ties as lru; ageing lets old favourites leave (kvcache/lfu)
    s3fifo  what was used once leaves quickly, so a scan does not wash out what is used again (kvcache/s3fifo)

Memory model: keys only, one entry per complete block; s3fifo remembers as many keys of blocks that have left.
Threading: none of their own; the server's event loop.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

from core.errors import ConfigError
from kvcache.keys import BlockKey
from kvcache.lfu import Lfu
from kvcache.s3fifo import S3Fifo


class Policy(Protocol):
    """An order of blocks. Keys that are not in its books are passed over everywhere."""

    def admitted(self, key: BlockKey) -> None:
        """A block is complete, or may be evicted again. It is not in the books."""
        ...

    def touched(self, keys: Sequence[BlockKey]) -> None:
        """A request that has this chain of blocks has stored them or has ended: they are recent, and in order."""
        ...

    def used(self, keys: Sequence[BlockKey]) -> None:
        """A request asked for this chain of blocks and got it."""
        ...

    def removed(self, key: BlockKey) -> None:
        """A block is gone, or may not be evicted for now."""
        ...

    def victim(self, may_go: Callable[[BlockKey], bool]) -> BlockKey | None:
        """The block that goes next, out of those that may; it leaves the books. None if none may."""
        ...


class Lru:
    """Least recently used first."""

    def __init__(self) -> None:
        self._order: OrderedDict[BlockKey, None] = OrderedDict()

    def admitted(self, key: BlockKey) -> None:
        self._order[key] = None

    def touched(self, keys: Sequence[BlockKey]) -> None:
        for key in reversed(keys):
            if key in self._order:
                self._order.move_to_end(key)

    def used(self, keys: Sequence[BlockKey]) -> None:
        self.touched(keys)

    def removed(self, key: BlockKey) -> None:
        self._order.pop(key, None)

    def victim(self, may_go: Callable[[BlockKey], bool]) -> BlockKey | None:
        key = next((key for key in self._order if may_go(key)), None)
        if key is not None:
            del self._order[key]
        return key


class Fifo(Lru):
    """First stored first, whatever is used."""

    def touched(self, keys: Sequence[BlockKey]) -> None:
        """Nothing changes."""


POLICIES: dict[str, Callable[[], Policy]] = {"lru": Lru, "lfu": Lfu, "fifo": Fifo, "s3fifo": S3Fifo}
"""By the word that `--cache` has for them."""


def make_policy(name: str) -> Policy:
    """Raises ConfigError with the names that there are."""
    if name not in POLICIES:
        raise ConfigError(f"--cache: policy={name} is none of {', '.join(POLICIES)}")
    return POLICIES[name]()
