"""A streamed answer, read as its bytes come: text out, and at the end everything that was said. No I/O here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from client.answers import Generation, Usage
from client.errors import NotReached, error_of
from client.operations import reuse_of

_DATA = b"data:"
_DONE = b"[DONE]"


class EventReader:
    """Reads server-sent events; lines may be cut anywhere."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._headers = headers
        self._held = b""
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._finish_reason: str | None = None
        self._usage: Usage | None = None
        self._last: dict[str, Any] = {}
        self._is_done = False

    def feed(self, chunk: bytes) -> list[str]:
        """The texts that are whole now. Raises BatonClientError if the server says that it broke off."""
        *lines, self._held = (self._held + chunk).split(b"\n")
        texts = [text for line in lines if line.startswith(_DATA) for text in self._take(line)]
        self._texts += texts
        return texts

    def end(self) -> Generation:
        """Everything that was said. Raises NotReached if the stream ended before its end."""
        if not self._is_done:
            raise NotReached("the stream ended before its end", 200, self._headers)
        return Generation(
            text="".join(self._texts),
            request_id=self._headers.get("x-request-id", ""),
            finish_reason=self._finish_reason,
            usage=self._usage,
            contexts=reuse_of(self._headers),
            token_ids=tuple(self._token_ids),
            body=self._last,
        )

    def _take(self, line: bytes) -> list[str]:
        data = line.removeprefix(_DATA).strip()
        if data == _DONE:
            self._is_done = True
            return []
        event = json.loads(data)
        if "error" in event:
            raise error_of(200, self._headers, data)
        self._last = event
        if event.get("usage"):
            self._usage = msgspec.convert(event["usage"], Usage)
        return [text for choice in event.get("choices", ())[:1] if (text := self._choice(choice))]

    def _choice(self, choice: dict[str, Any]) -> str:
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        self._token_ids += choice.get("token_ids") or []
        said = choice.get("delta") or choice
        return said.get("content") or said.get("text") or ""
