"""Blocks on their way down from the arena into the tiers, by the rules.

    Commit ──▶ queue (bounded) ──▶ put, every tier at once         write=through, off every engine's path
    found again ──▶ the same                                       admit=second
    little room left ──▶ the coldest ──▶ the same ──▶ evicted      write=back: a share of the arena is kept free for it

Memory model: tiers read the server's mapping of the arena. What goes down is pinned until the last thread has let go.
Threading: the server's event loop; tiers' calls run in their threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from kvcache.counts import Reason
from kvcache.entry import Entry, State
from kvcache.index import Index
from kvcache.keys import BlockKey
from kvcache.level import THREADS_PER_TIER, Level
from kvcache.ranges import aligned
from kvcache.rules import Admit, Write
from kvcache.tasks import Tasks
from transport.mapping import Mapping
from transport.regions import view

PUT_TIMEOUT_S = 10.0
MAX_QUEUED_SHARE = 0.25
"""Of the arena, for blocks that wait to go down: they are pinned, and must not crowd out what is asked for."""

FREE_SHARE = 1 / 16
"""Of the arena, that write=back keeps free: blocks are written down before their room is needed, since a place for a
new block cannot wait for a device. What is needed faster is evicted unwritten, and counted."""

DRAIN_S = 3.0
"""How long an orderly stop with write=back may write what is in the arena down."""


@dataclass
class _Down:
    """One block on its way down, pinned. reason: why it leaves the arena then; None: it stays."""

    entry: Entry
    reason: Reason | None


class Descent:
    """All of one server. levels: those that are written."""

    def __init__(self, levels: Sequence[Level], index: Index, arena: Mapping, tasks: Tasks) -> None:
        self._levels = levels
        self._index = index
        self._arena = arena
        self._tasks = tasks
        self._queue: asyncio.Queue[_Down] = asyncio.Queue()
        self._queued_bytes = 0
        self._putting: dict[BlockKey, asyncio.Future[None]] = {}
        if levels and index.rules.write is Write.BACK:
            index.retire = lambda entry: self._retire(entry, Reason.TTL)

    def start(self) -> None:
        """Begins to write down; from within the event loop."""
        for _ in range(THREADS_PER_TIER if self._levels else 0):
            self._tasks.keep(asyncio.create_task(self._write_down()))

    def committed(self, entry: Entry) -> None:
        """A block is complete: the tiers get it by the rules, when there is time."""
        self.came_up(entry)
        if self._levels and self._index.rules.write is Write.THROUGH and self._index.rules.admit is Admit.ALL:
            self._send_down(entry)

    def used(self, keys: Sequence[BlockKey]) -> None:
        """A request has found these blocks."""
        if self._levels and self._index.rules.admit is Admit.SECOND:
            for key in keys:
                entry = self._index.complete.get(key)
                if entry is not None and not entry.is_below:
                    self._send_down(entry)

    def came_up(self, entry: Entry) -> None:
        """A block has come up, and takes room that write=back wants to be free."""
        if self._levels and self._index.rules.write is Write.BACK:
            self._make_room(entry.num_bytes)

    async def drain(self) -> None:
        """With write=back, before an orderly stop: what no tier has goes down, oldest first, as far as time allows."""
        if not self._levels or self._index.rules.write is not Write.BACK:
            return
        for entry in self._index.complete.entries():
            if not entry.is_below:
                self._queue_down(entry, None)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._queue.join(), DRAIN_S)

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
            entry = self._index.complete.leaving.victim()
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
        for level in self._levels:
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
            (level, level.submit(partial(level.tier.put, entry.key, entry.digest, block))) for level in self._levels
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
            self._tasks.keep(asyncio.ensure_future(self._let_go_after(down, futures, ended)))
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

    async def ended(self, keys: Iterable[BlockKey] | None = None) -> None:
        """Waits for puts of these blocks, or of all, that are under way."""
        wanted = self._putting if keys is None else keys
        under_way = [self._putting[key] for key in wanted if key in self._putting]
        if under_way:
            await asyncio.wait(under_way, timeout=PUT_TIMEOUT_S)
