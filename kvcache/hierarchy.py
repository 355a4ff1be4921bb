"""The tiers below the arena, seen from its server: blocks go down by the rules and come up when asked for.

    Commit ──▶ queue (bounded) ──▶ tiers that are written: put    write=through, off every engine's path
    found again ──▶ the same                                   admit=second
    little room left ──▶ the coldest ──▶ the same ──▶ evicted  write=back: a share of the arena is kept free for it
    Search ──▶ contains, tier by tier ──▶ get into reserved places, several at once ──▶ committed ──▶ Found

A tier that fails or is late is bypassed by its breaker. A thread that hangs in a device keeps its place in the arena
reserved until it returns: a late write never reaches bytes that are somebody else's.

Memory model: tiers read and write the server's mapping of the arena. What goes down is pinned meanwhile.
Threading: the server's event loop; tiers' calls run in a small pool of threads per tier.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from core.clock import Clock
from kvcache.counts import Reason
from kvcache.index import SERVER, Entry, Index, State
from kvcache.keys import BlockKey
from kvcache.level import THREADS_PER_TIER, Level
from kvcache.ranges import aligned
from kvcache.rules import Admit, Write
from kvcache.shape import KnownShapes
from kvcache.tier import Tier
from transport.mapping import Mapping
from transport.regions import view

CONTAINS_TIMEOUT_S = 0.25
GET_TIMEOUT_S = 2.0
"""For one block; a whole prompt's worth is bounded by what its engine is willing to wait."""

PUT_TIMEOUT_S = 10.0
MAX_QUEUED_SHARE = 0.25
"""Of the arena, for blocks that wait to go down: they are pinned, and must not crowd out what is asked for."""

CLEAR_TIMEOUT_S = 30.0
FREE_SHARE = 1 / 16
"""Of the arena, that write=back keeps free: blocks are written down before their room is needed, since a place for a
new block cannot wait for a device. What is needed faster is evicted unwritten, and counted."""

DRAIN_S = 3.0
"""How long an orderly stop with write=back may write what is in the arena down."""

T = TypeVar("T")


@dataclass
class _Down:
    """One block on its way down, pinned. reason: why it leaves the arena then; None: it stays."""

    entry: Entry
    reason: Reason | None


class Hierarchy:
    """All tiers below one arena, the nearest first."""

    def __init__(
        self, tiers: Sequence[Tier], index: Index, arena: Mapping, clock: Clock, shapes: KnownShapes | None = None
    ) -> None:
        """shapes: told of by clients, asked by tiers that encode."""
        self.shapes = shapes or KnownShapes()
        self.levels = [Level(tier, clock) for tier in tiers]
        self._written = [level for level in self.levels if level.tier.is_written]
        self._index = index
        self._arena = arena
        self._coming: dict[BlockKey, asyncio.Future[bool]] = {}
        self._unwanted: set[BlockKey] = set()
        self._queue: asyncio.Queue[_Down] = asyncio.Queue()
        self._queued_bytes = 0
        self._putting: dict[BlockKey, asyncio.Future[None]] = {}
        self.num_clearing = 0
        if self._written and index.rules.write is Write.BACK:
            index.retire = lambda entry: self._retire(entry, Reason.TTL)
        self._tasks: set[asyncio.Task[object]] = set()

    def start(self) -> None:
        """Begins to write down; from within the event loop."""
        for _ in range(THREADS_PER_TIER if self._written else 0):
            self._keep(asyncio.create_task(self._write_down()))

    async def find(self, keys: Sequence[BlockKey]) -> list[Level]:
        """For each of the first keys, without a gap, a tier that has it."""
        found: list[Level] = []
        while len(found) < len(keys):
            rest = keys[len(found) :]
            for level in self.levels:
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

    def committed(self, entry: Entry) -> None:
        """A block is complete: the tiers get it by the rules, when there is time."""
        if self._written and self._index.rules.write is Write.BACK:
            self._make_room(entry.num_bytes)
        elif self._written and self._index.rules.admit is Admit.ALL:
            self._send_down(entry)

    def used(self, keys: Sequence[BlockKey]) -> None:
        """A request has found these blocks."""
        if self._written and self._index.rules.admit is Admit.SECOND:
            for key in keys:
                entry = self._index.get(key)
                if entry is not None and not entry.is_below:
                    self._send_down(entry)

    def forget(self, keys: Sequence[BlockKey]) -> None:
        """Blocks that turned out bad, or are not wanted any more, anywhere. They have left the arena."""
        forgotten = list(keys)
        if self.levels and forgotten:
            self._unwanted.update(key for key in forgotten if key in self._coming)
            self._keep(asyncio.create_task(self._forget(forgotten)))

    def clear(self) -> None:
        """Forgets every block of every tier; the arena was emptied. `num_clearing` says whether it is done."""
        if self.levels:
            self._unwanted.update(self._coming)
            self.num_clearing += 1
            self._keep(asyncio.create_task(self._clear()))

    async def drain(self) -> None:
        """With write=back, before an orderly stop: what no tier has goes down, oldest first, as far as time allows."""
        if not self._written or self._index.rules.write is not Write.BACK:
            return
        for entry in self._index.entries():
            if not entry.is_below:
                self._queue_down(entry, None)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._queue.join(), DRAIN_S)

    def close(self) -> None:
        """Stops writing down; what was queued is lost for the tiers."""
        for task in list(self._tasks):
            task.cancel()
        for level in self.levels:
            level.close()

    def _fetch(self, key: BlockKey, level: Level, block_bytes: int, tenant: bytes) -> asyncio.Future[bool] | None:
        """A place in the arena and a thread that fills it; None if there is no room."""
        granted = self._index.reserve(SERVER, [key], block_bytes, tenant)
        if not granted:
            return None
        ((_, offset),) = granted
        coming: asyncio.Future[bool] = asyncio.ensure_future(self._fill(key, level, offset, block_bytes))
        self._coming[key] = coming
        self._keep(coming)
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
            self._came_up(key, level)
            level.counts.hits += 1
            level.counts.get_bytes += block_bytes
            level.counts.get_s += loop.time() - begun_s
            return True
        if future is None or future.done():
            self._index.abandon(SERVER, [key])
        else:
            future.add_done_callback(lambda _: self._index.abandon(SERVER, [key]))
        return False

    def _came_up(self, key: BlockKey, level: Level) -> None:
        entry = self._index.get(key)
        assert entry is not None, "it was committed"
        entry.is_below = level.tier.is_written  # what a peer gave is in no tier of ours
        if self._written and self._index.rules.write is Write.BACK:
            self._make_room(entry.num_bytes)

    def _send_down(self, entry: Entry) -> None:
        """It stays in the arena."""
        if self._has_room(entry):
            self._queue_down(entry, None)
        else:
            self._count_dropped()

    def _make_room(self, num_bytes: int) -> None:
        """With write=back: the coldest blocks leave until there will be room for so many bytes and for a burst."""
        wanted_bytes = max(self._index.capacity_bytes * FREE_SHARE, aligned(num_bytes))
        while self._index.free_bytes + self._queued_bytes < wanted_bytes:
            entry = self._index.coldest()
            if entry is None:
                return
            self._retire(entry, Reason.SPACE)

    def _retire(self, entry: Entry, reason: Reason) -> None:
        """Out of the arena, by way of the tiers if they do not have it and there is time."""
        if entry.is_below:
            self._index.evict(entry, reason)
        elif self._has_room(entry):
            self._index.take(entry)
            self._queue_down(entry, reason)
        else:
            self._count_dropped()
            self._index.evict(entry, reason)

    def _has_room(self, entry: Entry) -> bool:
        return self._queued_bytes + entry.num_bytes <= self._index.capacity_bytes * MAX_QUEUED_SHARE

    def _count_dropped(self) -> None:
        for level in self._written:
            level.counts.dropped += 1

    def _queue_down(self, entry: Entry, reason: Reason | None) -> None:
        if reason is None:  # otherwise it was pinned when it was taken
            entry.pins += 1
        entry.is_below = True
        self._queued_bytes += entry.num_bytes
        self._queue.put_nowait(_Down(entry, reason))

    async def _write_down(self) -> None:
        while True:
            down = await self._queue.get()
            try:
                await self._put(down)
            finally:
                self._queued_bytes -= down.entry.num_bytes
                self._queue.task_done()

    async def _put(self, down: _Down) -> None:
        """To every tier at once; the bytes stay pinned until the last thread has let go of them."""
        entry = down.entry
        if entry.state is not State.READY:  # dropped while it waited
            self._let_go(down)
            return
        ended = self._putting[entry.key] = asyncio.get_running_loop().create_future()
        block = view(self._arena.address + entry.offset, entry.num_bytes)
        puts = [
            (level, level.submit(partial(level.tier.put, entry.key, entry.digest, block))) for level in self._written
        ]
        futures, num_done = [], 0
        for level, future in puts:
            done = await level.wait(future, PUT_TIMEOUT_S, False)
            level.counts.puts += done
            level.counts.put_bytes += done * entry.num_bytes
            level.counts.dropped += not done
            num_done += done
            if future is not None and not future.done():
                futures.append(future)
        entry.is_below = num_done > 0
        if futures:
            self._keep(asyncio.ensure_future(self._let_go_after(down, futures, ended)))
        else:
            self._put_ended(down, ended)

    async def _let_go_after(
        self, down: _Down, futures: Sequence[asyncio.Future[bool]], ended: asyncio.Future[None]
    ) -> None:
        await asyncio.wait(futures)
        self._put_ended(down, ended)

    def _put_ended(self, down: _Down, ended: asyncio.Future[None]) -> None:
        if self._putting.get(down.entry.key) is ended:
            del self._putting[down.entry.key]
        ended.set_result(None)
        self._let_go(down)

    def _let_go(self, down: _Down) -> None:
        if down.reason is None:
            down.entry.pins -= 1
        else:
            self._index.settle(down.entry, down.reason)

    async def _forget(self, keys: list[BlockKey]) -> None:
        """After the puts of these blocks that are under way, or they would be back."""
        await self._puts_of(keys)
        for level in self.levels:
            future = level.submit(partial(level.tier.delete, keys))
            self._keep(asyncio.ensure_future(level.wait(future, PUT_TIMEOUT_S, None)))

    async def _clear(self) -> None:
        try:
            await self._puts_of(list(self._putting))
            for level in self.levels:
                future = level.submit(partial(_cleared, level.tier))
                level.counts.uncleared += not await level.wait(future, CLEAR_TIMEOUT_S, False)
        finally:
            self.num_clearing -= 1

    async def _puts_of(self, keys: Sequence[BlockKey]) -> None:
        under_way = [self._putting[key] for key in keys if key in self._putting]
        if under_way:
            await asyncio.wait(under_way, timeout=PUT_TIMEOUT_S)

    def _keep(self, task: asyncio.Future[T]) -> None:
        """The event loop holds tasks only weakly."""
        if isinstance(task, asyncio.Task):
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


def _cleared(tier: Tier) -> bool:
    tier.clear()
    return True
