"""One client's questions to the cache server: what is there, and what may be written.

A Search whose blocks lie in other tiers is answered twice: at once with what the arena has and how much is coming, and
again when it has come. Other words of the same client go on meanwhile.

Threading: the server's event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

from core.errors import ProtocolError
from kvcache import wire
from kvcache.hierarchy import Hierarchy
from kvcache.index import Index
from kvcache.keys import BlockKey
from kvcache.wire import keys_of, tenant_of

MAX_SEARCHES = 256
"""Of one client at the same time that wait for other tiers; further ones get what the arena has."""


class Questions:
    """Of the client `owner`. block_bytes: of its blocks, 0 for one that has none. `send` is where answers go."""

    def __init__(self, index: Index, hierarchy: Hierarchy, owner: int) -> None:
        self._index = index
        self._hierarchy = hierarchy
        self._owner = owner
        self._all: dict[int, asyncio.Task[None]] = {}
        self.block_bytes = 0
        self.send: Callable[[wire.ToClient], None] = lambda _: None

    def search(self, message: wire.Search) -> None:
        """Answers at once, and once more if tiers below have what follows. Raises ProtocolError."""
        keys, end = keys_of(message.keys), keys_of(message.partial)
        tenant_of(message.tenant)
        slots = self._pin(message.id, keys + end, [])
        rest = keys[len(slots) :]
        if not rest or not self._hierarchy.levels or not self.block_bytes or len(self._all) >= MAX_SEARCHES:
            self._answer(message, keys, slots)
            return
        self._begin(message.id, self._search_below(message, keys, slots))

    def _begin(self, lease: int, searching: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(searching)
        self._all[lease] = task
        task.add_done_callback(lambda _: self._all.pop(lease, None))

    async def _search_below(self, message: wire.Search, keys: list[BlockKey], slots: list[wire.Slot]) -> None:
        """The arena has a part; the tiers below are asked for what follows."""
        keys_and_end = keys + keys_of(message.partial)
        rest = keys_and_end[len(slots) :]
        levels = await self._hierarchy.up.find(rest)
        origins: list[str] = []
        if levels:
            self.send(wire.Found(message.id, slots, coming=len(levels)))
            origins = await self._hierarchy.up.bring_up(rest[: len(levels)], levels, self.block_bytes, message.tenant)
        origins = [slot.tier for slot in slots] + origins
        self._answer(message, keys, self._pin(message.id, keys_and_end, origins))

    def _pin(self, lease: int, keys: list[BlockKey], origins: list[str]) -> list[wire.Slot]:
        found = self._index.search(self._owner, lease, keys)
        tiers = [*origins, *(entry.tier for entry in found[len(origins) :])]
        return [wire.Slot(entry.offset, entry.digest, tier) for entry, tier in zip(found, tiers, strict=False)]

    def _answer(self, message: wire.Search, keys: list[BlockKey], slots: list[wire.Slot]) -> None:
        end, num_found, tenant = keys_of(message.partial), len(slots), tenant_of(message.tenant)
        self._index.counts.searched += len(keys)
        self._index.counts.found += min(num_found, len(keys))
        self._index.complete.leaving.use((keys + end)[:num_found])
        self._hierarchy.down.used((keys + end)[:num_found])
        if num_found > len(keys):  # with the prompt's end: there is nothing more to find or to write
            self.send(wire.Found(message.id, slots))
            return
        grants = self._reserve(keys[num_found:], num_found, tenant) if message.reserve else []
        has_partial = self._index.complete.has_partial(keys[num_found - 1] if slots else message.root)
        if end and num_found == len(keys) and self._hierarchy.levels:
            has_partial = True  # that is only likely: its place is granted when SearchPartial has not found it
        elif end and message.reserve:
            grants += self._reserve(end, len(keys), tenant, keys[-1] if keys else message.root)
        self.send(wire.Found(message.id, slots, grants, has_partial=has_partial))

    def search_partial(self, message: wire.SearchPartial) -> None:
        """Answers at once or, if a tier below has the first, when it has come. Raises ProtocolError."""
        keys = keys_of(message.keys)
        tenant_of(message.tenant)
        if self._answer_partial(message.id, keys):
            return
        if keys and self._hierarchy.levels and self.block_bytes and len(self._all) < MAX_SEARCHES:
            self._begin(message.id, self._search_partial_below(message, keys[:1]))
        else:
            self._answer_no_partial(message, keys[:1])

    async def _search_partial_below(self, message: wire.SearchPartial, keys: list[BlockKey]) -> None:
        levels = await self._hierarchy.up.find(keys)
        origins: list[str] = []
        if levels:
            origins = await self._hierarchy.up.bring_up(keys, levels, self.block_bytes, tenant_of(message.tenant))
        if not origins or not self._answer_partial(message.id, keys, origins[0]):
            self._answer_no_partial(message, keys)

    def _answer_partial(self, lease: int, keys: list[BlockKey], tier: str = "host") -> bool:
        index = next((index for index, key in enumerate(keys) if key in self._index.complete), None)
        if index is None:
            return False
        (entry,) = self._index.search(self._owner, lease, keys[index : index + 1])
        self._index.complete.leaving.use(keys[index : index + 1])
        self._hierarchy.down.used(keys[index : index + 1])
        self.send(wire.Found(lease, [wire.Slot(entry.offset, entry.digest, tier)], index=index))
        return True

    def _answer_no_partial(self, message: wire.SearchPartial, keys: list[BlockKey]) -> None:
        grants = self._reserve(keys, 0, tenant_of(message.tenant), message.before) if message.before else []
        self.send(wire.Found(message.id, grants=grants))

    def reserve(self, message: wire.Reserve) -> None:
        """Answers what may be written. Raises ProtocolError."""
        grants = self._reserve(keys_of(message.keys), 0, tenant_of(message.tenant))
        self.send(wire.Granted(message.id, grants))

    def close(self) -> None:
        """Nobody waits for answers any more."""
        for task in self._all.values():
            task.cancel()

    def _reserve(self, keys: list[BlockKey], first: int, tenant: bytes, before: BlockKey = b"") -> list[wire.Grant]:
        if not self.block_bytes:
            raise ProtocolError("a client without blocks cannot write any")
        granted = self._index.reserve(self._owner, keys, self.block_bytes, tenant, before)
        return [wire.Grant(first + index, offset) for index, offset in granted]

    def release(self, lease: int) -> None:
        """Also of a search that still waits for other tiers: it is answered with nothing, what comes is nobody's."""
        task = self._all.pop(lease, None)
        if task is not None:
            task.cancel()
            self.send(wire.Found(lease))
        self._index.leases.release(self._owner, lease)
