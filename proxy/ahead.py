"""A context's prompt, computed by an ordinary request that nobody waits for but the proxy itself.

    body ──▶ Exchange (label in its ticket) ──▶ Flow: queue, route (one token: P alone), leg ──▶ its answer, kept here

Because it is an ordinary request it waits in the same queue, is tried again like any other, and has a record.
"""

from __future__ import annotations

import json
from collections.abc import MutableMapping
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.responses import Response

from core.handoff import Label
from kvcache.partial import MIN_TOKENS
from proxy.body import ClientBody
from proxy.flow import Exchange, Flow, new_request_id
from proxy.records import Records
from proxy.split import Endpoint

_KEPT_HEADERS = ("content-type", "retry-after", "x-request-id")


class Computed(msgspec.Struct, frozen=True):
    """What came of it. tokens: of the prompt. block_size: tokens in one block of the instance that computed it."""

    request_id: str
    tokens: int = 0
    block_size: int = 0
    model: str = ""

    @property
    def num_blocks(self) -> int:
        """That can be kept: full ones, and the prompt's end if it is not too short."""
        if not self.block_size:
            return 0
        num_full, end = divmod(self.tokens, self.block_size)
        return num_full + (end >= MIN_TOKENS)


class _Answer:
    """Takes an answer as a server's client would."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        self.body += message.get("body", b"")


class Ahead:
    """Computes prompts. All on the event loop's thread."""

    def __init__(self, flow: Flow, records: Records) -> None:
        self._flow = flow
        self._records = records

    async def compute(
        self, endpoint: Endpoint, fields: dict[str, Any], label: Label, forwarded: dict[str, str]
    ) -> Computed | Response:
        """What was computed, or the error that a client gets."""
        record = self._records.start(new_request_id(), None, endpoint.value)
        body = ClientBody(fields, json.dumps(fields, separators=(",", ":")).encode())
        answer = _Answer()
        await self._flow.run(Exchange(endpoint, body, forwarded, record, answer.send, label))
        if answer.status != HTTPStatus.OK:
            headers = {name: value for name, value in answer.headers.items() if name in _KEPT_HEADERS}
            return Response(answer.body, answer.status, headers=headers)
        told = json.loads(answer.body)
        block_size = record.server.info.block_size if record.server is not None else 0
        return Computed(record.id, told["usage"]["prompt_tokens"], block_size, told.get("model") or "")
