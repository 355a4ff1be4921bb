"""The tiers below the arena, seen from its server: blocks go down when they are complete and come up when asked for.

    Commit ──▶ queue (bounded) ──▶ tiers that are written: put             write-through, off every engine's path
    Search ──▶ contains, tier by tier ──▶ get into reserved places, several at once ──▶ committed ──▶ Found

A tier that fails or is late is bypassed by its breaker. A thread that hangs in a device keeps its place in the arena
reserved until it returns: a late write never reaches bytes that are somebody else's.

Memory model: tiers read and write the server's mapping of the arena. What goes down is pinned meanwhile.
Threading: the server's event loop; tiers' calls run in a small pool of threads per tier.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from core.clock import Clock
from kvcache.breaker import Breaker
from kvcache.index import SERVER, Entry, Index
from kvcache.keys import BlockKey
from kvcache.tier import Tier, TierError
from transport.mapping import Mapping
from transport.regions import view

THREADS_PER_TIER = 4
CONTAINS_TIMEOUT_S = 0.25
GET_TIMEOUT_S = 2.0
"""For one block; a whole prompt's worth is bounded by what its engine is willing to wait."""

PUT_TIMEOUT_S = 10.0
MAX_QUEUED_SHARE = 0.25
"""Of the arena, for blocks that wait to go down: they are pinned, and must not crowd out what is asked for."""

T = TypeVar("T")


@dataclass
class TierCounts:
    """One tier since the server started, in blocks and bytes."""

    hits: int = 0
    get_bytes: int = 0
    get_s: float = 0.0
    puts: int = 0
    put_bytes: int = 0
    dropped: int = 0
    errors: int = 0


class Level:
    """One tier with its threads and its breaker."""

    def __init__(self, tier: Tier, clock: Clock) -> None:
        self.tier = tier
        self.counts = TierCounts()
        self._breaker = Breaker(clock)
        self._pool = ThreadPoolExecutor(THREADS_PER_TIER, thread_name_prefix=f"baton-cache-{tier.name}")

    @property
    def is_bypassed(self) -> bool:
        return self._breaker.is_open

    def submit(self, call: Callable[[], T]) -> asyncio.Future[T] | None:
        """Runs one call of the tier in a thread; None while the tier is bypassed."""
        if not self._breaker.allows():
            return None
        return asyncio.get_running_loop().run_in_executor(self._pool, call)

    async def wait(self, future: asyncio.Future[T] | None, timeout_s: float, otherwise: T) -> T:
        """The call's result; `otherwise` if the tier failed or is late, which counts against it."""
        if future is None:
            return otherwise
        try:
            result = await asyncio.wait_for(asyncio.shield(future), timeout_s)
        except Exception as error:  # noqa: BLE001 - a tier's mistake must cost its blocks and not the server
            if not isinstance(error, TierError | TimeoutError):
                print(f"tier {self.tier.name}: {type(error).__name__}: {error}", flush=True)
            self.counts.errors += 1
            self._breaker.bad()
            future.add_done_callback(_forget)
            return otherwise
        self._breaker.good()
        return result

    def close(self) -> None:
        """Without waiting for threads that hang."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.tier.close()


class Hierarchy:
    """All tiers below one arena, the nearest first."""

    def __init__(self, tiers: Sequence[Tier], index: Index, arena: Mapping, clock: Clock) -> None:
        self.levels = [Level(tier, clock) for tier in tiers]
        self._written = [level for level in self.levels if level.tier.is_written]
        self._index = index
        self._arena = arena
        self._coming: dict[BlockKey, asyncio.Future[bool]] = {}
        self._queue: asyncio.Queue[Entry] = asyncio.Queue()
        self._queued_bytes = 0
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

    async def bring_up(self, keys: Sequence[BlockKey], levels: Sequence[Level], block_bytes: int) -> list[str]:
        """Brings blocks into the arena, in order; returns the tiers that gave the first of them, without a gap."""
        waiting = []
        for key, level in zip(keys, levels, strict=True):
            coming = self._coming.get(key) or self._fetch(key, level, block_bytes)
            if coming is None:
                break
            waiting.append((coming, level.tier.name))
        origins: list[str] = []
        for coming, name in waiting:
            if not await asyncio.shield(coming):
                break
            origins.append(name)
        return origins

    def write_down(self, entry: Entry) -> None:
        """A block is complete: the tiers that want it get it when there is time."""
        if not self._written:
            return
        if self._queued_bytes + entry.num_bytes > self._index.capacity_bytes * MAX_QUEUED_SHARE:
            for level in self._written:
                level.counts.dropped += 1
            return
        entry.pins += 1
        self._queued_bytes += entry.num_bytes
        self._queue.put_nowait(entry)

    def forget(self, keys: Sequence[BlockKey]) -> None:
        """Blocks that turned out bad, or are not wanted any more, anywhere."""
        wanted = list(keys)
        for level in self.levels:
            future = level.submit(partial(level.tier.delete, wanted))
            self._keep(asyncio.ensure_future(level.wait(future, PUT_TIMEOUT_S, None)))

    def close(self) -> None:
        """Stops writing down; what was queued is lost for the tiers."""
        for task in list(self._tasks):
            task.cancel()
        for level in self.levels:
            level.close()

    def _fetch(self, key: BlockKey, level: Level, block_bytes: int) -> asyncio.Future[bool] | None:
        """A place in the arena and a thread that fills it; None if there is no room."""
        granted = self._index.reserve(SERVER, [key], block_bytes)
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
        if digest is not None and self._index.commit(SERVER, key, offset, digest):
            level.counts.hits += 1
            level.counts.get_bytes += block_bytes
            level.counts.get_s += loop.time() - begun_s
            return True
        if future is None or future.done():
            self._index.abandon(SERVER, [key])
        else:
            future.add_done_callback(lambda _: self._index.abandon(SERVER, [key]))
        return False

    async def _write_down(self) -> None:
        while True:
            entry = await self._queue.get()
            try:
                await self._put(entry)
            finally:
                self._queued_bytes -= entry.num_bytes

    async def _put(self, entry: Entry) -> None:
        """To every tier; the bytes stay pinned until the last thread has let go of them."""
        block = view(self._arena.address + entry.offset, entry.num_bytes)
        key, digest = entry.key, entry.digest
        futures = []
        for level in self._written:
            future = level.submit(partial(level.tier.put, key, digest, block))
            done = await level.wait(future, PUT_TIMEOUT_S, False)
            level.counts.puts += done
            level.counts.put_bytes += done * entry.num_bytes
            level.counts.dropped += not done
            if future is not None and not future.done():
                futures.append(future)
        if futures:
            self._keep(asyncio.ensure_future(self._unpin_after(entry, futures)))
        else:
            entry.pins -= 1

    async def _unpin_after(self, entry: Entry, futures: Sequence[asyncio.Future[bool]]) -> None:
        await asyncio.wait(futures)
        entry.pins -= 1

    def _keep(self, task: asyncio.Future[T]) -> None:
        """The event loop holds tasks only weakly."""
        if isinstance(task, asyncio.Task):
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


def _forget(future: asyncio.Future[T]) -> None:
    """Of a call that nobody waits for any more: its error is no news."""
    if not future.cancelled():
        future.exception()
