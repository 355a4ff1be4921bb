"""Blocks on their way up from the tiers into the arena.

    find: contains, tier by tier ──▶ bring_up: get into reserved places, several at once ──▶ committed

A thread that hangs in a device keeps its place in the arena reserved until it returns: a late write never reaches bytes
that are somebody else's.

Memory model: tiers write into the server's mapping of the arena, in places that nobody can find yet.
Threading: the server's event loop; tiers' calls run in their threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from kvcache.entry import Entry
from kvcache.index import SERVER, Index
from kvcache.keys import BlockKey
from kvcache.level import Level
from kvcache.tasks import Tasks
from transport.mapping import Mapping
from transport.regions import view

CONTAINS_TIMEOUT_S = 0.25
GET_TIMEOUT_S = 2.0
"""For one block; a whole prompt's worth is bounded by what its engine is willing to wait."""


class Ascent:
    """All of one server. came_up: is told of each block that has come."""

    def __init__(
        self, levels: Sequence[Level], index: Index, arena: Mapping, tasks: Tasks, came_up: Callable[[Entry], None]
    ) -> None:
        self._levels = levels
        self._index = index
        self._arena = arena
        self._tasks = tasks
        self._came_up = came_up
        self._coming: dict[BlockKey, asyncio.Future[bool]] = {}
        self._unwanted: set[BlockKey] = set()

    def unwanted(self, keys: Iterable[BlockKey] | None = None) -> None:
        """These, or all, are not to be found when they have come."""
        self._unwanted.update(self._coming if keys is None else (key for key in keys if key in self._coming))

    async def find(self, keys: Sequence[BlockKey]) -> list[Level]:
        """For each of the first keys, without a gap, a tier that has it."""
        found: list[Level] = []
        while len(found) < len(keys):
            rest = keys[len(found) :]
            for level in self._levels:
                asked = level.submit(partial(level.tier.contains, rest))
                num_found = await level.wait(asked, CONTAINS_TIMEOUT_S, 0)
                if num_found:
                    found += [level] * min(num_found, len(rest))
                    break
            else:
                break
        return found

    async def bring_up(
        self, keys: Sequence[BlockKey], levels: Sequence[Level], block_bytes: int, tenant: bytes
    ) -> list[str]:
        """Brings blocks into the arena, in order; returns the tiers that gave the first of them, without a gap."""
        waiting = []
        for key, level in zip(keys, levels, strict=True):
            coming = self._coming.get(key) or self._fetch(key, level, block_bytes, tenant)
            if coming is None:
                break
            waiting.append((coming, level.tier.name))
        origins: list[str] = []
        for coming, name in waiting:
            if not await asyncio.shield(coming):
                break
            origins.append(name)
        return origins

    def _fetch(self, key: BlockKey, level: Level, block_bytes: int, tenant: bytes) -> asyncio.Future[bool] | None:
        """A place in the arena and a thread that fills it; None if there is no room."""
        granted = self._index.reserve(SERVER, [key], block_bytes, tenant)
        if not granted:
            return None
        ((_, offset),) = granted
        coming: asyncio.Future[bool] = asyncio.ensure_future(self._fill(key, level, offset, block_bytes))
        self._coming[key] = coming
        self._tasks.keep(coming)
        return coming

    async def _fill(self, key: BlockKey, level: Level, offset: int, block_bytes: int) -> bool:
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        into = view(self._arena.address + offset, block_bytes)
        future = level.submit(partial(level.tier.get, key, into))
        try:
            digest = await level.wait(future, GET_TIMEOUT_S, None)
        finally:
            self._coming.pop(key, None)
            is_wanted = key not in self._unwanted
            self._unwanted.discard(key)
        lossy = level.tier.lossy
        if digest is not None and is_wanted and self._index.commit(SERVER, key, offset, digest, lossy):
            entry = self._index.complete.get(key)
            assert entry is not None, "it was committed"
            entry.is_below = level.tier.is_written  # what a peer gave is in no tier of ours
            self._came_up(entry)
            level.counts.hits += 1
            level.counts.get_bytes += block_bytes
            level.counts.get_s += loop.time() - begun_s
            return True
        if future is None or future.done():
            self._index.abandon(SERVER, [key])
        else:
            future.add_done_callback(lambda _: self._index.abandon(SERVER, [key]))
        return False
