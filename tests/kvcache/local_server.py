"""A cache server on a thread of the test's own process, so that its tiers can be faulty ones and looked at."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from core.clock import Clock, SystemClock
from core.errors import TransferError
from kvcache.client import ask_figures
from kvcache.rules import Rules
from kvcache.server import ArenaFds, CacheServer
from kvcache.tier import Tier
from tests.poll import until


class LocalServer:
    """`socket` and `figures`, as `tests.kvcache.places.Server` has them."""

    def __init__(self, socket: str) -> None:
        self.socket = socket

    def figures(self) -> dict[str, float]:
        return ask_figures(self.socket)

    def is_up(self) -> bool:
        with suppress(TransferError):
            return bool(self.figures())
        return False


@contextmanager
def serving_here(
    folder: Path, arena_bytes: int, *tiers: Tier, rules: Rules | None = None, clock: Clock | None = None
) -> Iterator[LocalServer]:
    """Serves until the block's end."""
    fds = ArenaFds(arena_bytes)
    path = folder / "cache.sock"
    loop = asyncio.new_event_loop()
    serving = loop.create_task(CacheServer((fds.arena, fds.ledger), path, clock or SystemClock(), tiers, rules).serve())
    thread = threading.Thread(target=_run, args=(loop, serving))
    thread.start()
    server = LocalServer(str(path))
    try:
        until(server.is_up, what="the server's answer")
        yield server
    finally:
        loop.call_soon_threadsafe(serving.cancel)
        thread.join(20.0)
        assert not thread.is_alive(), "the server did not end"
        fds.close()


def _run(loop: asyncio.AbstractEventLoop, serving: asyncio.Task[None]) -> None:
    with suppress(asyncio.CancelledError):
        loop.run_until_complete(serving)
    loop.run_until_complete(_drained())
    loop.close()


async def _drained() -> None:
    """What the server's end has cancelled gets its turn to end."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=5.0)
