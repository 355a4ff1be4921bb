"""A host that peers may ask, on a thread of the test's own process, so that its index can be looked at."""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from core.clock import SystemClock
from kvcache.index import Index
from kvcache.keys import BlockKey
from kvcache.peer_server import PeerServer
from tests.kvcache.places import ledger_of
from tests.poll import until
from transport.mapping import Mapping, make_memfd

OWNER = 1

T = TypeVar("T")


class Holder:
    """An arena, its index and a PeerServer. `call` runs something on their thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, arena_bytes: int) -> None:
        self._loop = loop
        self._ledger, self._ledger_memory = ledger_of(arena_bytes)
        fd = make_memfd(arena_bytes)
        self.arena = Mapping(fd, arena_bytes)
        os.close(fd)
        clock = SystemClock()
        self.index = Index(arena_bytes, self._ledger, clock)
        self.server = PeerServer("127.0.0.1:0", self.index, self.arena, clock)
        self.peer = self.server.address.removeprefix("tcp://")

    def call(self, function: Callable[[], T]) -> T:
        """Runs it on the server's thread; its result."""
        return asyncio.run_coroutine_threadsafe(_run(function), self._loop).result(10.0)

    def keep(self, key: BlockKey, digest: int, block: bytes) -> None:
        """The arena has this block from now on; a block of another size under this key is replaced."""

        def store() -> None:
            self.index.drop([key])
            ((_, offset),) = self.index.reserve(OWNER, [key], len(block))
            ctypes.memmove(self.arena.address + offset, block, len(block))
            assert self.index.commit(OWNER, key, offset, digest)

        self.call(store)

    def drop(self, key: BlockKey) -> None:
        self.call(lambda: self.index.drop([key]))

    def num_pinned(self) -> int:
        """Blocks that somebody reads."""
        return self.call(lambda: sum(entry.pins for entry in self.index.complete.entries()))

    def figures(self) -> dict[str, float]:
        return self.call(self.server.figures)

    def free(self) -> None:
        self.arena.close()
        self._ledger_memory.close()


@contextmanager
def holding(arena_bytes: int) -> Iterator[Holder]:
    """Serves until the block's end, and nothing is pinned then."""
    loop = asyncio.new_event_loop()
    holder = Holder(loop, arena_bytes)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        holder.call(holder.server.start)
        yield holder
    finally:
        holder.call(holder.server.close)
        until(lambda: holder.num_pinned() == 0, what="every pin")
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10.0)
        loop.run_until_complete(_drained())
        loop.close()
        holder.free()


async def _run(function: Callable[[], T]) -> T:
    return function()


async def _drained() -> None:
    """What the server's end has cancelled gets its turn to end."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=5.0)
