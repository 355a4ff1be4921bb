"""The web application: paths, bodies in, errors out. Everything that happens to a request is in `proxy/flow`.

One process, one event loop, no locks. A generation request is answered on the bare ASGI interface, so that a chunk
costs one call and a client that leaves is noticed at any moment, also before the first byte.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from core.clock import Clock
from core.errors import BatonError
from proxy.admission import Admission
from proxy.ahead import Ahead
from proxy.arrival import client_id, forwarded, read
from proxy.body import ClientBody, read_body
from proxy.context_journal import Journal
from proxy.context_orders import Orders
from proxy.context_routes import ContextRoutes
from proxy.context_store import ContextStore
from proxy.context_use import Composition, ContextUse
from proxy.control import Control
from proxy.errors import ErrorAnswer, LegFailed, NoInstance, error_answer, http_error_answer
from proxy.flow import Exchange, Flow, new_request_id
from proxy.labels import Labels
from proxy.leg import Answer, Call, Upstream
from proxy.metrics import Metrics
from proxy.records import Records
from proxy.registry import Registry
from proxy.router import Router
from proxy.settings import Settings
from proxy.split import Endpoint
from proxy.tenant import make_tenants

PASSED_THROUGH = [
    "/tokenize",
    "/detokenize",
    "/pooling",
    "/classify",
    "/score",
    "/rerank",
    "/v1/embeddings",
    "/v1/score",
    "/v1/rerank",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/chat/completions/render",
    "/v1/completions/render",
]
"""vLLM's other JSON endpoints without side effects; they go to one instance as they are, but for the salt."""

SALTED = frozenset({"/v1/responses", "/v1/messages"})
"""Those of them that generate and, in vLLM 0.32, have a cache_salt."""


def make_app(settings: Settings, clock: Clock) -> FastAPI:
    """A proxy that listens nowhere yet; `app.state.proxy` is its Proxy. Raises ConfigError if its key file is bad."""
    proxy = Proxy(settings, clock)
    app = FastAPI(lifespan=proxy.lifespan, openapi_url=None)
    app.state.proxy = proxy
    for endpoint in Endpoint:
        app.add_api_route(endpoint.value, proxy.generate(endpoint), methods=["POST"], response_model=None)
    for path in PASSED_THROUGH:
        app.add_api_route(path, proxy.pass_through, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", proxy.models, methods=["GET"], response_model=None)
    app.include_router(proxy.control.routes())
    app.include_router(proxy.context_routes.routes(proxy.of_tenant))
    app.add_exception_handler(BatonError, _on_our_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_client_gone)
    app.add_exception_handler(Exception, _on_crash)
    return app


class Proxy:
    """Everything a proxy consists of, put together once."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self._tenants = make_tenants(settings)
        self.registry = Registry(settings, clock, self._probe)
        self.upstream = Upstream(self.registry)
        self.router = Router(self.registry, settings)
        self.admission = Admission(self.router, settings)
        self.registry.on_change = self.admission.pump
        metrics = Metrics()
        self.records = Records(clock, metrics)
        labels = Labels(settings.cache_socket)
        self.control = Control(settings, self.registry, self.admission, self.records, metrics, labels)
        self._flow = Flow(settings, self.router, self.admission, self.upstream, self.records)
        store = self._store = ContextStore(settings, clock, Journal(settings.contexts_file))
        self._contexts = ContextUse(store, Orders())
        ahead = Ahead(self._flow, self.records)
        self.context_routes = ContextRoutes(store, self._contexts, ahead, labels, clock)

    @contextlib.asynccontextmanager
    async def lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(self.registry.watch())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.wait({watching})
            await self.registry.close()
            await self.upstream.close()
            self._store.close()

    def generate(self, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
        """The handler of an endpoint that is split."""

        async def handle(request: Request) -> Response:
            headers = forwarded(request)
            body = self.of_tenant(read_body(await read(request)), headers)
            composition = self._contexts.compose(endpoint, body, body.fields.get("cache_salt"))
            return _Generation(self, endpoint, composition, headers)

        return handle

    async def pass_through(self, request: Request) -> Response:
        body, headers = read_body(await read(request)), forwarded(request)
        if request.url.path in SALTED:
            body = self.of_tenant(body, headers)
        return await self._ask_any(Call(request.url.path, headers, body.raw))

    async def models(self, request: Request) -> Response:
        return await self._ask_any(Call("/v1/models", forwarded(request), method="GET"))

    def of_tenant(self, body: ClientBody, headers: dict[str, str]) -> ClientBody:
        """The body in the cache of whoever has sent these headers."""
        key = headers.get("authorization") or headers.get("x-api-key")
        salt = self._tenants.salt(key) if self._tenants is not None else None
        return body.with_salt(salt)

    async def serve(self, exchange: Exchange, composition: Composition) -> None:
        """One generation, to its end."""
        exchange.record.contexts = composition.reuse
        await self._flow.run(exchange)
        if exchange.record.status == "done":
            self._contexts.done(composition)

    async def _ask_any(self, call: Call) -> Response:
        """One decode instance, or a prefill one; another if it fails."""
        tried: set[str] = set()
        failure: LegFailed | None = None
        while (instance := self.router.another(tried)) is not None:
            tried.add(instance.name)
            try:
                return _response(await self.upstream.ask(instance, call))
            except LegFailed as error:
                failure = error
        raise failure or NoInstance("no instance is ready to serve")

    async def _probe(self, url: str) -> bool:
        return await self.upstream.is_healthy(url)


class _Generation(Response):
    """Runs the flow as the response, watching the client meanwhile."""

    def __init__(self, proxy: Proxy, endpoint: Endpoint, composition: Composition, headers: dict[str, str]) -> None:
        super().__init__()
        self._proxy = proxy
        self._endpoint = endpoint
        self._composition = composition
        self._forwarded = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = self._proxy.records.start(new_request_id(), client_id(scope), self._endpoint.value)
        exchange = Exchange(self._endpoint, self._composition.body, self._forwarded, record, send)
        running = asyncio.create_task(self._proxy.serve(exchange, self._composition))
        watching = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait({running, watching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            tasks = [task for task in (running, watching) if not task.done()]
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
        if not running.cancelled():
            running.result()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _response(answer: Answer) -> Response:
    if answer.rest is None:
        return Response(answer.body, answer.status, media_type=answer.content_type)
    return _Stream(answer)


class _Stream(Response):
    """A passed-through stream, watching the client meanwhile."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(status_code=answer.status, media_type=answer.content_type)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        leg = self._answer.rest
        assert leg is not None
        watching = asyncio.create_task(_until_gone(receive))
        watching.add_done_callback(lambda task: None if task.cancelled() else leg.abort("client gone"))
        headers = [item for item in self.raw_headers if item[0] != b"content-length"]
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": self._answer.body, "more_body": True})
        try:
            with contextlib.closing(leg), contextlib.suppress(LegFailed):
                while chunk := await leg.more():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            watching.cancel()


async def _on_our_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, BatonError)
    return error_answer(error).response()


async def _on_http_error(request: Request, error: Exception) -> Response:
    status, detail = getattr(error, "status_code", 500), getattr(error, "detail", "")
    return http_error_answer(status, f"{request.method} {request.url.path}: {detail}").response()


async def _on_client_gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)


async def _on_crash(_request: Request, error: Exception) -> Response:
    return ErrorAnswer(500, f"the proxy failed: {type(error).__name__}", "internal_error").response()
