"""A client that measures: one streamed completion at a time over plain HTTP, and the proxy's record of it."""

from __future__ import annotations

import http.client
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import msgspec

from cluster.members import get
from core.clock import Clock
from core.errors import BatonError

TIMEOUT_S = 300.0
REPORT_TIMEOUT_S = 5.0
_POLL_S = 0.05
_STREAMED = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
"""Tokens are counted by what the server counts: their ids would bring the whole prompt's with the first."""


class Streamed(msgspec.Struct, frozen=True):
    """When tokens came, in seconds after the request was sent. One event may bring several."""

    request_id: str
    arrivals_s: tuple[float, ...]
    num_tokens: int

    @property
    def gaps_s(self) -> list[float]:
        return [right - left for left, right in itertools.pairwise(self.arrivals_s)]


def ask(url: str, body: dict[str, Any], clock: Clock) -> Streamed:
    """One streamed completion over a connection that is open before the clock starts. Raises BatonError."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT_S)
    content = json.dumps(body | _STREAMED).encode()
    try:
        connection.connect()
        begun_s = clock.monotonic_s()
        connection.request("POST", "/v1/completions", content, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise BatonError(f"{url} answered {response.status}: {response.read(500).decode(errors='replace')}")
        arrivals, num_tokens = [], 0
        for count in token_counts(iter(response.readline, b"")):
            arrivals.append(clock.monotonic_s() - begun_s)
            num_tokens += count
        response.read()  # a client that leaves before the very end counts as gone
        return Streamed(response.headers.get("x-request-id", ""), tuple(arrivals), num_tokens)
    except (OSError, http.client.HTTPException) as error:
        raise BatonError(f"the request to {url} failed: {type(error).__name__} {error}") from error
    finally:
        connection.close()


def token_counts(lines: Iterator[bytes]) -> Iterator[int]:
    """How many tokens each event of a stream brings, for those that bring any. Raises BatonError if it breaks off."""
    before = 0
    for line in lines:
        content = line.strip()
        if content == b"data: [DONE]":
            return
        if not content.startswith(b"data: "):
            continue
        event = json.loads(content[6:])
        if "error" in event:
            raise BatonError(f"the stream carries an error: {event['error']}")
        now = (event.get("usage") or {}).get("completion_tokens", before)
        if now > before:
            yield now - before
        before = now
    raise BatonError("the stream ended without [DONE]")


def record_of(url: str, request_id: str, *, handed_off: bool) -> dict[str, Any]:
    """The proxy's record of a request; of one that was handed off, once both instances have reported."""
    deadline = time.monotonic() + REPORT_TIMEOUT_S
    while True:
        status, body = get(f"{url}/requests/{request_id}")
        if status != 200:
            raise BatonError(f"{url} has no record of request {request_id} (status {status})")
        record: dict[str, Any] = json.loads(body)
        reported = record.get("prefill") and record.get("tokens", {}).get("computed")
        is_complete = record.get("status") != "running" and (reported or not handed_off)
        if is_complete or time.monotonic() > deadline:
            return record
        time.sleep(_POLL_S)
