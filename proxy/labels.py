"""What the host's cache server keeps, of each context by its label and in all: asked for in threads, with a bound.

    event loop ── to_thread ──▶ kvcache.client ── unix socket ──▶ cache server

A server that hangs costs LIMIT_S and an error that says so. Threading: called from the event loop's thread alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from core.errors import TransferError
from kvcache import client
from kvcache.wire import LabelFigures
from proxy.errors import CacheUnreachable, RequestRefused

LIMIT_S = 5.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.01, 0.2
_AT_ONCE = 4
"""Questions under way; a thread that waits for a server that hangs must not be one of very many."""

T = TypeVar("T")


class Labels:
    """Questions to the cache server behind `socket`; empty: there is none."""

    def __init__(self, socket: str) -> None:
        self._socket = socket
        self._places = asyncio.Semaphore(_AT_ONCE)

    def check_cache(self) -> None:
        """Raises RequestRefused (409) that names the remedy where nothing can be kept."""
        if not self._socket:
            raise RequestRefused(
                "contexts are kept in a KV cache and this cluster has none: start it with --cache 8GiB",
                409,
                code="no_cache",
            )

    async def figures(self) -> dict[str, LabelFigures]:
        """Every label by name; none without a cache. Raises CacheUnreachable."""
        if not self._socket:
            return {}
        return {figures.name: figures for figures in await self._ask(lambda: client.labels(self._socket))}

    async def server_figures(self) -> dict[str, float]:
        """The server's counters and sizes; none without a cache, or where it does not answer."""
        if not self._socket:
            return {}
        try:
            return await self._ask(lambda: client.ask_figures(self._socket))
        except CacheUnreachable:
            return {}

    async def complete(self, name: str, num_blocks: int, timeout_s: float) -> LabelFigures | None:
        """The label once so many of its blocks are complete, or as it is when the time is over."""
        loop = asyncio.get_running_loop()
        end_s, wait_s = loop.time() + timeout_s, _FIRST_WAIT_S
        while True:
            found = (await self.figures()).get(name)
            if (found is not None and found.blocks >= num_blocks) or loop.time() >= end_s:
                return found
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    async def pin(self, name: str, pinned: bool) -> None:
        """Raises CacheUnreachable, also where the server refuses."""
        await self._ask(lambda: client.pin_label(self._socket, name, pinned))

    async def drop(self, name: str) -> None:
        """Its blocks are found no more. Raises CacheUnreachable."""
        if self._socket:
            await self._ask(lambda: client.drop_label(self._socket, name))

    async def _ask(self, question: Callable[[], T]) -> T:
        try:
            async with asyncio.timeout(LIMIT_S), self._places:
                return await asyncio.to_thread(question)
        except TimeoutError as error:
            raise CacheUnreachable(f"the cache server does not answer within {LIMIT_S:g} s") from error
        except TransferError as error:
            raise CacheUnreachable(str(error)) from error
