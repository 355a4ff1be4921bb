"""What a client raises, in one tree.

    BatonError (core)
    └── BatonClientError     status, code, param, retry_after_s, request_id: as far as there was an answer
        ├── NotReached       no connection, or it broke off
        ├── TimedOut         nothing came for `timeout_s`
        ├── Busy             429 or 503, also after the last try: try again after `retry_after_s`
        ├── ContextNotFound  the id is not known (any more), or it is another tenant's
        └── Refused          every other error that the server answers

httpx's errors are translated where they occur.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus

from core.errors import BatonError

BUSY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
_SHOWN_BYTES = 300


class BatonClientError(BatonError):
    """Root of the client's errors. status: 0 where there was no answer."""

    def __init__(self, message: str, status: int = 0, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        headers = headers or {}
        self.status = status
        self.code: str | None = None
        self.param: str | None = None
        self.retry_after_s = _seconds(headers.get("retry-after"))
        self.request_id = headers.get("x-request-id", "")


class NotReached(BatonClientError):
    """No connection, or one that broke off."""


class TimedOut(BatonClientError):
    """Nothing came for `timeout_s`."""


class Busy(BatonClientError):
    """A bound was reached, or nobody can serve now."""


class ContextNotFound(BatonClientError):
    """No context of this id is known (any more) to this tenant."""


class Refused(BatonClientError):
    """The request will not be served as it is, or failed."""


def error_of(status: int, headers: Mapping[str, str], body: bytes) -> BatonClientError:
    """The error that an answer is, from OpenAI's error object where there is one."""
    told = _error_object(body)
    code = str(told["code"]) if told.get("code") is not None else None
    kind: type[BatonClientError] = Refused
    if status in BUSY:
        kind = Busy
    elif code == "context_not_found":
        kind = ContextNotFound
    message = str(told.get("message") or body[:_SHOWN_BYTES].decode(errors="replace") or f"status {status}")
    error = kind(message, status, headers)
    error.code = code
    error.param = str(told["param"]) if told.get("param") is not None else None
    return error


def _error_object(body: bytes) -> dict[str, object]:
    try:
        told = json.loads(body)
    except ValueError:
        return {}
    inner = told.get("error") if isinstance(told, dict) else None
    return inner if isinstance(inner, dict) else {}


def _seconds(text: str | None) -> float | None:
    """Of a Retry-After in seconds; a date is left out."""
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:
        return None
