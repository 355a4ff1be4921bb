"""One request to one instance: opened, read, and closed at once when nobody wants its answer any more.

Closing the connection is how vLLM learns that a request is cancelled, so a leg that is given up never keeps its
connection for reuse. The network's errors become LegFailed here and nowhere else.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus

import aiohttp
import msgspec

from proxy.errors import LegFailed
from proxy.registry import Instance, Registry

_KEEPALIVE_S = 2.0
"""vLLM closes idle connections after 5 s; ours must not be picked in the moment it does."""
_CONNECT_TIMEOUT_S = 5.0
_SILENCE_TIMEOUT_S = 3600.0
"""An answer that is not streamed is silent while it is made, however long that takes; this only bounds the absurd."""
_PROBE_TIMEOUT_S = 2.0
_CLOSING_STEPS = 3
"""Steps of the event loop that a connection of a leg just given up takes to close; no session waits for those."""


class Answer(msgspec.Struct, frozen=True):
    """What an instance answered.

    body: everything, or, of a stream, what has come so far (at least one byte, unless the stream is empty).
    rest: the leg that yields the rest of a stream; None if body is everything.
    """

    status: int
    content_type: str
    body: bytes
    rest: Leg | None = None

    @property
    def failed(self) -> bool:
        return self.status >= HTTPStatus.INTERNAL_SERVER_ERROR


class Call(msgspec.Struct, frozen=True):
    """What is sent: method, path, headers and body."""

    path: str
    headers: dict[str, str]
    body: bytes | None = None
    method: str = "POST"


class Upstream:
    """The connections to all instances."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._session: aiohttp.ClientSession | None = None

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=_SILENCE_TIMEOUT_S
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                headers={"Accept-Encoding": "identity"},
            )
        return self._session

    async def ask(self, instance: Instance, call: Call) -> Answer:
        """Opens a leg and waits for its answer. Raises LegFailed; the instance is marked for it."""
        leg = Leg(instance)
        try:
            answer = await leg.first(self.session, call)
        except LegFailed as error:
            if error.refused:
                self._registry.mark_lost(instance)
            else:
                self._registry.mark_suspect(instance)
            raise
        if answer.failed:
            self._registry.mark_suspect(instance)
        return answer

    async def is_healthy(self, url: str) -> bool:
        try:
            timeout = aiohttp.ClientTimeout(total=_PROBE_TIMEOUT_S)
            async with self.session.get(url.rstrip("/") + "/health", timeout=timeout) as response:
                return response.status == HTTPStatus.OK
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            return False

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            for _ in range(_CLOSING_STEPS):
                await asyncio.sleep(0)


class Leg:
    """One connection, from opening to the last byte."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self._response: aiohttp.ClientResponse | None = None
        self._task: asyncio.Task[object] | None = None
        self._aborted = ""

    async def first(self, session: aiohttp.ClientSession, call: Call) -> Answer:
        """The whole answer, or its first bytes if it is a stream of events."""
        self._task = asyncio.current_task()
        self.instance.legs.add(self)
        answer = None
        try:
            answer = await self._open(session, call)
            return answer
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise self._failure(error) from error
        except asyncio.CancelledError:
            if not self._aborted or self._task is None or self._task.uncancel() > 0:
                raise
            raise LegFailed(self._aborted) from None
        finally:
            self._task = None
            if answer is None or answer.rest is None:
                self.close()

    async def _open(self, session: aiohttp.ClientSession, call: Call) -> Answer:
        url = self.instance.info.url.rstrip("/") + call.path
        self._response = await session.request(call.method, url, data=call.body, headers=call.headers)
        status, content_type = self._response.status, self._response.headers.get("Content-Type", "")
        if status == HTTPStatus.OK and content_type.startswith("text/event-stream"):
            return Answer(status, content_type, await self._response.content.readany(), self)
        return Answer(status, content_type, await self._response.read())

    async def more(self) -> bytes:
        """What has come of a stream since; empty at its end. Raises LegFailed if it broke off."""
        assert self._response is not None, "a leg has a stream only after first()"
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._failure(error) from error

    def abort(self, why: str) -> None:
        """Ends the leg from outside; whoever waits on it gets LegFailed."""
        self._aborted = why
        if self._response is not None:
            self._response.close()
        elif self._task is not None:
            self._task.cancel()

    def close(self) -> None:
        """Drops the connection, unless the answer was read to its end (then it has gone back to the pool already)."""
        self.instance.legs.discard(self)
        if self._response is not None:
            self._response.close()

    def _failure(self, error: Exception) -> LegFailed:
        if self._aborted:
            return LegFailed(self._aborted)
        if isinstance(error, aiohttp.ClientConnectorError):
            return LegFailed("connection refused", refused=True)
        return LegFailed(f"connection lost ({type(error).__name__})")
