"""What clients are told when something goes wrong, in OpenAI's format.

BatonError (core/errors)
├── RequestRefused       this request will never be served as it is: 400, 404, 413, ...
├── NoInstance           nobody can serve now: 503 with Retry-After
├── CacheUnreachable     the host's cache server does not answer: 503 with Retry-After
├── Overloaded (core)    a bound was reached: 429 with Retry-After
└── LegFailed            one instance could not be reached or broke off; translated from the network's errors
"""

from __future__ import annotations

import json
import math
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.responses import Response

from core.errors import BatonError, Overloaded


class RequestRefused(BatonError):
    """The client must change its request."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


class NoInstance(BatonError):
    """No instance can serve this request at the moment."""


class CacheUnreachable(BatonError):
    """What needs the cache server itself, and not only what it keeps, must wait."""


class LegFailed(BatonError):
    """An instance was not reached, or broke off before its answer was whole. The text is the reason, in few words."""

    def __init__(self, why: str, refused: bool = False) -> None:
        super().__init__(why)
        self.why = why
        self.refused = refused


_TYPES = {
    400: "invalid_request_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}


class ErrorAnswer(msgspec.Struct, frozen=True):
    """One error as the client gets it."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry_after_s: float | None = None

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        default = "invalid_request_error" if self.status < 500 else "server_error"
        kind = _TYPES.get(self.status, default)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def encoded(self) -> bytes:
        """As ASCII: a client's field name may hold half a surrogate pair, which no UTF-8 encoder takes."""
        return json.dumps(self.body(), separators=(",", ":")).encode()

    def headers(self) -> dict[str, str]:
        if self.retry_after_s is None:
            return {}
        return {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}

    def response(self) -> Response:
        return Response(self.encoded(), self.status, headers=self.headers(), media_type="application/json")


def error_answer(error: BatonError) -> ErrorAnswer:
    """Which status and words a client gets for one of our own errors."""
    text = str(error)
    if isinstance(error, RequestRefused):
        return ErrorAnswer(error.status, text, error.code, error.param)
    if isinstance(error, Overloaded):
        return ErrorAnswer(429, text, "overloaded", retry_after_s=error.retry_after_s)
    if isinstance(error, NoInstance):
        return ErrorAnswer(503, text, "no_instance", retry_after_s=1.0)
    if isinstance(error, CacheUnreachable):
        return ErrorAnswer(503, text, "cache_unreachable", retry_after_s=1.0)
    if isinstance(error, LegFailed):
        return ErrorAnswer(503, f"the instance that served this request was lost: {text}", "instance_lost", None, 1.0)
    return ErrorAnswer(500, text, "internal_error")


def http_error_answer(status: int, detail: object) -> ErrorAnswer:
    """For errors that the web framework raises itself, such as an unknown path."""
    phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "Error"
    return ErrorAnswer(status, str(detail or phrase), phrase.lower().replace(" ", "_"))
