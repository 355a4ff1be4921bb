"""One request's life: queued, routed, both legs at once, streamed, done.

        client ──> queue ──> route ─┬─ D's leg: the client's body and the ticket ──> first byte ──> client
                                    └─ P's leg: one token, same ticket           ──> read and dropped

    D answers (anything)               P's leg is cancelled: it has done its part, or is not needed
    P fails before D has answered      D notices by itself and computes (its report says so); a D that says nothing for
                                       takeover_s is asked again, alone (prefill_failed:...)
    P ends well                        its window place is free; D's answer is awaited
    D fails before the first byte      another D is asked, then a P, alone (resumed)
    D breaks off in a stream           the stream ends with an error event
    client leaves, at any moment       both legs' connections are closed at once

Nothing goes to the client before the first byte of an answer, so until then every failure can be made good.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import closing
from http import HTTPStatus
from typing import Any

import msgspec

from core.errors import Overloaded
from core.handoff import Handoff, Label, Peer
from proxy.admission import Admission, Lease
from proxy.body import ClientBody
from proxy.errors import ErrorAnswer, LegFailed, NoInstance, error_answer
from proxy.leg import Answer, Call, Upstream
from proxy.records import Record, Records
from proxy.registry import Instance
from proxy.router import Router, Want
from proxy.settings import Settings
from proxy.split import Endpoint, is_short, prefill_body, wants_one_token, why_not_handed_off
from proxy.usage import EventFilter, without_cached

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_MAX_RETRIES = 2
_END_OF_STREAM = b"data: [DONE]\n\n"


class Exchange(msgspec.Struct, frozen=True):
    """One client's request, and the way back to it. label: names the prompt's blocks in the host's cache."""

    endpoint: Endpoint
    body: ClientBody
    forwarded: dict[str, str]
    record: Record
    send: Send
    label: Label | None = None

    @property
    def id(self) -> str:
        return self.record.id

    def call(self, body: bytes) -> Call:
        return Call(self.endpoint.value, self.forwarded | {"X-Request-Id": self.id}, body)


def new_request_id() -> str:
    return "req-" + secrets.token_hex(8)


class Flow:
    """Takes exchanges through their life; one `run` per request, all on the event loop's thread."""

    def __init__(
        self, settings: Settings, router: Router, admission: Admission, upstream: Upstream, records: Records
    ) -> None:
        self._settings = settings
        self._router = router
        self._admission = admission
        self._upstream = upstream
        self._records = records

    async def run(self, exchange: Exchange) -> None:
        """Until the client has its answer. Cancel it when the client leaves."""
        status = "failed"
        try:
            if await self._serve(exchange):
                status = "done"
        except asyncio.CancelledError:
            status = "done" if exchange.record.is_whole else "cancelled"
            raise
        finally:
            self._records.finish(exchange.record, status)

    async def _serve(self, exchange: Exchange) -> bool:
        """True if the client got what it asked for."""
        try:
            with await self._admission.admit(*self._wish(exchange)) as lease:
                self._records.routed(exchange.record, lease.route)
                exchange.record.when_reported = lease.release_prefill
                answer = await self._answer(exchange, lease)
                return await self._relay(exchange, answer)
        except (Overloaded, NoInstance, LegFailed) as error:
            await self._refuse(exchange, error_answer(error))
            return False

    def _wish(self, exchange: Exchange) -> tuple[Want, str]:
        endpoint, fields = exchange.endpoint, exchange.body.fields
        if wants_one_token(endpoint, fields):
            return Want.ONE_TOKEN, ""
        why = why_not_handed_off(endpoint, fields)
        if why is None and is_short(fields, self._settings.threshold):
            why = "short_prompt"
        return (Want.HANDOFF, "") if why is None else (Want.ALONE, why)

    async def _answer(self, exchange: Exchange, lease: Lease) -> Answer:
        """From the routed instances, or from another if they fail. Raises LegFailed if nobody answered."""
        server, prefill = lease.route.server, lease.route.prefill
        if prefill is None:
            answer = await self._ask(exchange, server, None)
        else:
            answer = await self._ask_both(exchange, lease, prefill)
        tried = {server.name}
        for _ in range(_MAX_RETRIES):
            if isinstance(answer, Answer) and not answer.failed:
                break
            other = self._router.another(tried)
            if other is None:
                break
            why = answer.why if isinstance(answer, LegFailed) else f"status {answer.status}"
            self._records.resumed(exchange.record, other, f"{server.name}: {why}")
            lease.move_to(other)
            server = other
            tried.add(other.name)
            answer = await self._ask(exchange, other, None)
        if isinstance(answer, LegFailed):
            raise answer
        return answer

    async def _ask(self, exchange: Exchange, server: Instance, prefill: Instance | None) -> Answer | LegFailed:
        body = exchange.body.with_ticket(self._ticket(exchange, server, prefill))
        try:
            return await self._upstream.ask(server, exchange.call(body))
        except LegFailed as failure:
            return failure

    async def _ask_both(self, exchange: Exchange, lease: Lease, prefill: Instance) -> Answer | LegFailed:
        """D and P at the same time; see the module's table for who ends whom."""
        server, taken = lease.route.server, False
        answering = asyncio.create_task(self._ask(exchange, server, prefill))
        prefilling = asyncio.create_task(self._prefill(exchange, server, prefill))
        try:
            await asyncio.wait({answering, prefilling}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                lease.release_prefill()
                why = prefilling.result()
                if why and not await self._takes_over(exchange.record, answering):
                    await _give_up(answering)
                    self._records.prefill_failed(exchange.record, why)
                    return await self._ask(exchange, server, None)
            answer = await answering
            taken = True
            return answer
        finally:
            await _give_up(prefilling)
            lease.release_prefill()
            if not taken:
                await _give_up(answering)

    async def _takes_over(self, record: Record, answering: asyncio.Task[Answer | LegFailed]) -> bool:
        """P has failed: whether D has noticed, and goes on without it."""
        heard = asyncio.create_task(record.heard.wait())
        timeout_s = self._settings.takeover_s
        try:
            await asyncio.wait({answering, heard}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            heard.cancel()
        return answering.done() or record.heard.is_set()

    async def _prefill(self, exchange: Exchange, server: Instance, prefill: Instance) -> str:
        """P's leg. Empty if it ended well, else why not."""
        ticket = self._ticket(exchange, server, prefill)
        assert ticket is not None, "the router pairs only instances with a control address"
        copy = prefill_body(exchange.endpoint, exchange.body.fields, ticket)
        try:
            answer = await self._upstream.ask(prefill, exchange.call(json.dumps(copy, separators=(",", ":")).encode()))
        except LegFailed as failure:
            return failure.why
        return "" if answer.status == HTTPStatus.OK else f"status {answer.status}"

    def _ticket(self, exchange: Exchange, server: Instance, prefill: Instance | None) -> Handoff | None:
        if not server.info.control:
            return None
        peer = _peer(prefill) if prefill is not None else None
        return Handoff(exchange.id, _peer(server), peer, self._settings.timeout_s, exchange.label)

    async def _relay(self, exchange: Exchange, answer: Answer) -> bool:
        """The answer to the client. True if it was whole and no error."""
        route = exchange.record.route
        handed_off = route is not None and route.prefill is not None
        if answer.status == HTTPStatus.OK:
            self._records.first_token(exchange.record, answer.rest is not None)
        if answer.rest is not None:
            return await self._relay_stream(exchange, answer, EventFilter() if handed_off else None)
        body = without_cached(answer.body) if handed_off else answer.body
        await self._start(
            exchange, answer.status, {"content-type": answer.content_type, "content-length": str(len(body))}
        )
        await exchange.send({"type": "http.response.body", "body": body})
        return answer.status < 400

    async def _relay_stream(self, exchange: Exchange, answer: Answer, events: EventFilter | None) -> bool:
        assert answer.rest is not None
        send, whole = exchange.send, True
        with closing(answer.rest) as leg:
            await self._start(exchange, answer.status, {"content-type": answer.content_type})
            chunk = answer.body
            try:
                while chunk:
                    if events is not None:
                        chunk = events.feed(chunk)
                    exchange.record.is_whole = chunk.endswith(_END_OF_STREAM)
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                    chunk = await leg.more()
                last = events.flush() if events is not None else b""
            except LegFailed as failure:
                whole = False
                last = b"\n\ndata: " + error_answer(failure).encoded() + b"\n\ndata: [DONE]\n\n"
        await send({"type": "http.response.body", "body": last})
        return whole

    async def _refuse(self, exchange: Exchange, error: ErrorAnswer) -> None:
        headers = {"content-type": "application/json"} | error.headers()
        await self._start(exchange, error.status, headers)
        await exchange.send({"type": "http.response.body", "body": error.encoded()})

    async def _start(self, exchange: Exchange, status: int, headers: dict[str, str]) -> None:
        headers = headers | {"x-request-id": exchange.id}
        if exchange.record.contexts:
            headers["x-baton-contexts"] = ", ".join(f"{id_}={reuse}" for id_, reuse in exchange.record.contexts)
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await exchange.send({"type": "http.response.start", "status": status, "headers": raw})


def _peer(instance: Instance) -> Peer:
    return Peer(instance.name, instance.info.control, instance.info.boot_id, instance.info.num_ranks)


async def _give_up(task: asyncio.Task[Any]) -> None:
    """Ends a leg that nobody wants any more and waits until it has let go of its connection."""
    task.cancel()
    await asyncio.wait({task})
    answer = None if task.cancelled() else task.result()
    if isinstance(answer, Answer) and answer.rest is not None:
        answer.rest.close()
