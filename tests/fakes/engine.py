"""A small real server that speaks vLLM's HTTP: it answers, streams, records what it got, and fails when told to.

It runs an event loop in a thread of its own, on a free port. Its text is always ` t0 t1 t2 ...`, one word a token, so a
test can tell what is missing.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from aiohttp import web

from core.handoff import Role
from core.topology import InstanceInfo

T = TypeVar("T")
_POLL_S = 0.002
_START_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Received:
    """One request as it arrived."""

    path: str
    raw: bytes
    body: dict[str, Any]
    headers: dict[str, str]

    @property
    def request_id(self) -> str:
        return self.headers.get("x-request-id", "")


@dataclass
class Behaviour:
    """What the engine does with requests from now on.

    status: anything but 200 is answered at once, with `message`.
    hold: nothing is answered while it is set. hold_body: a stream's headers are, its first byte is not.
    hold_after: a stream stops after so many events; break_after: and the connection is cut there. hold_end: a stream
        is not closed behind its last event.
    cached: what usage says of cached tokens, if anything.
    """

    status: int = 200
    message: str = "told to fail"
    hold: bool = False
    hold_body: bool = False
    hold_after: int | None = None
    break_after: int | None = None
    hold_end: bool = False
    cut: bool = False
    healthy: bool = True
    cached: int | None = None


@dataclass
class FakeEngine:
    """One instance; `with FakeEngine(Role.DECODE) as engine:`."""

    role: Role
    name: str = ""
    boot_id: str = "boot-1"
    control: str = "tcp://127.0.0.1:1"
    fingerprint: str = "same"
    port: int = 0
    behaviour: Behaviour = field(default_factory=Behaviour)
    received: list[Received] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    """Ids of requests whose client went away before the answer was whole."""

    def __enter__(self) -> FakeEngine:
        self.name = self.name or self.role.value
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"fake-{self.name}", daemon=True)
        self._thread.start()
        self._call(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Closes the port and cuts every connection."""
        if self._thread.is_alive():
            self._call(self._close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_START_TIMEOUT_S)
            self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def info(self) -> InstanceInfo:
        return InstanceInfo(self.name, self.role, self.url, self.boot_id, self.control, self.fingerprint)

    def generations(self) -> list[Received]:
        return [r for r in self.received if r.path in ("/v1/chat/completions", "/v1/completions")]

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_START_TIMEOUT_S)

    async def _start(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._generate)
        app.router.add_post("/v1/completions", self._generate)
        app.router.add_post("/{rest:.*}", self._echo)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.05)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def _close(self) -> None:
        await self._runner.cleanup()
        for _ in range(5):  # one that was accepted while the server closed belongs to nobody, and closing takes a step
            for transport in list(getattr(self._loop, "_transports", {}).values()):
                transport.abort()
            await asyncio.sleep(0)

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response(status=200 if self.behaviour.healthy else 503)

    async def _models(self, _request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fake", "object": "model", "owned_by": self.name}]})

    async def _echo(self, request: web.Request) -> web.Response:
        received = await self._receive(request)
        return web.json_response({"path": received.path, "body": received.body, "by": self.name})

    async def _receive(self, request: web.Request) -> Received:
        raw = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        received = Received(request.path, raw, json.loads(raw), headers)
        self.received.append(received)
        return received

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        received = await self._receive(request)
        try:
            await self._while(lambda: self.behaviour.hold)
            if self.behaviour.cut:
                return self._cut(request)
            if self.behaviour.status != 200:
                error = {"message": self.behaviour.message, "type": "BadRequestError", "param": None, "code": 0}
                return web.json_response({"error": error}, status=self.behaviour.status)
            if received.body.get("stream"):
                return await self._stream(request, received)
            return web.json_response(self._whole(received))
        except (asyncio.CancelledError, ConnectionError):
            self.left.append(received.request_id)
            raise

    async def _stream(self, request: web.Request, received: Received) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        await self._while(lambda: self.behaviour.hold_body)
        for number, event in enumerate(self._events(received)):
            await self._while(lambda number=number: number == self.behaviour.hold_after)  # type: ignore[misc]
            if number == self.behaviour.break_after:
                self._cut(request)
                return response
            await response.write(b"data: " + event + b"\n\n")
        await self._while(lambda: self.behaviour.hold_end)
        await response.write_eof()
        return response

    def _cut(self, request: web.Request) -> web.Response:
        if request.transport is not None:
            request.transport.abort()
        return web.Response()

    async def _while(self, condition: Callable[[], bool]) -> None:
        while condition():
            await asyncio.sleep(_POLL_S)

    def _events(self, received: Received) -> list[bytes]:
        body, is_chat = received.body, "chat" in received.path
        events = []
        for token in range(_num_tokens(body)):
            for index in range(body.get("n") or 1):
                text = f" t{token}"
                choice = {"index": index, "delta": {"content": text}} if is_chat else {"index": index, "text": text}
                events.append(self._object(received, [choice], chunk=is_chat))
        if (body.get("stream_options") or {}).get("include_usage"):
            events.append(self._object(received, [], chunk=is_chat) | {"usage": self._usage(body)})
        return [json.dumps(event).encode() for event in events] + [b"[DONE]"]

    def _whole(self, received: Received) -> dict[str, Any]:
        body, is_chat = received.body, "chat" in received.path
        text = "".join(f" t{token}" for token in range(_num_tokens(body)))
        choices = []
        for index in range(body.get("n") or 1):
            shown = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
            choices.append({"index": index, "finish_reason": "length", **shown})
        return self._object(received, choices, chunk=False) | {"usage": self._usage(body)}

    def _object(self, received: Received, choices: list[dict[str, Any]], chunk: bool) -> dict[str, Any]:
        kind = "chat.completion" if "chat" in received.path else "text_completion"
        kind += ".chunk" if chunk else ""
        return {
            "id": f"x-{received.request_id}",
            "object": kind,
            "created": 1,
            "model": received.body.get("model") or "fake",
            "system_fingerprint": self.name,
            "choices": choices,
        }

    def _usage(self, body: dict[str, Any]) -> dict[str, Any]:
        tokens = _num_tokens(body)
        usage: dict[str, Any] = {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 7 + tokens}
        cached = self.behaviour.cached
        return usage | {"prompt_tokens_details": {"cached_tokens": cached} if cached is not None else None}


def _num_tokens(body: dict[str, Any]) -> int:
    return int(body.get("max_completion_tokens") or body.get("max_tokens") or 16)
