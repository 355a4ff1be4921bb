"""Both clients behind one face, so that every test of a promise runs with each."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from client import AsyncBatonClient, BatonClient
from client.conversation import AsyncConversation


class Blocking:
    """The async client (or a conversation of it), each call waited for on a loop of its own."""

    def __init__(self, inner: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._inner = inner
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        return self._waiting(value) if callable(value) else value

    def _waiting(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **fields: Any) -> Any:
            result = method(*arguments, **fields)
            if inspect.isasyncgen(result):
                return self._loop.run_until_complete(_listed(result))
            if inspect.isawaitable(result):
                result = self._loop.run_until_complete(_awaited(result))
            return Blocking(result, self._loop) if isinstance(result, AsyncConversation) else result

        return call

    def read(self, prompt: Any, **fields: Any) -> tuple[list[str], Any]:
        """Streams; the pieces, and what was said altogether."""

        async def reading() -> tuple[list[str], Any]:
            async with await self._inner.stream(prompt, **fields) as stream:
                return [piece async for piece in stream], stream.generation

        return self._loop.run_until_complete(reading())

    def begin(self, prompt: Any, then: Callable[[], None], **fields: Any) -> str:
        """Streams, leaves the `async with` after the first piece, and calls `then`."""

        async def beginning() -> str:
            async with await self._inner.stream(prompt, **fields) as stream:
                pieces = aiter(stream)
                first = await anext(pieces)
            await asyncio.to_thread(then)
            await pieces.aclose()
            return str(first)

        return self._loop.run_until_complete(beginning())


class Direct:
    """The synchronous client, with the same two words for streams."""

    def __init__(self, inner: BatonClient) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def read(self, prompt: Any, **fields: Any) -> tuple[list[str], Any]:
        with self._inner.stream(prompt, **fields) as stream:
            return list(stream), stream.generation

    def begin(self, prompt: Any, then: Callable[[], None], **fields: Any) -> str:
        with self._inner.stream(prompt, **fields) as stream:
            pieces = iter(stream)
            first = next(pieces)
        then()
        del pieces
        return first


@contextmanager
def client_of(kind: str, url: str, sleep: Callable[[float], None], **options: Any) -> Iterator[Any]:
    """kind: `sync` or `async`. sleep: called with the seconds that the client would wait."""
    if kind == "sync":
        with BatonClient(url, sleep=sleep, **options) as inner:
            yield Direct(inner)
        return

    async def sleeping(seconds: float) -> None:
        await asyncio.to_thread(sleep, seconds)

    loop = asyncio.new_event_loop()
    client = AsyncBatonClient(url, sleep=sleeping, **options)
    try:
        yield Blocking(client, loop)
    finally:
        loop.run_until_complete(client.close())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


async def _listed(items: Any) -> list[Any]:
    return [item async for item in items]


async def _awaited(result: Any) -> Any:
    return await result
