"""What is taken from a request as it arrives: its body up to a bound, the headers that travel on, the client's id."""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import Scope

from proxy.body import MAX_BODY_BYTES
from proxy.errors import RequestRefused

_FORWARDED = ("authorization", "x-api-key", "traceparent", "tracestate")
_MAX_CLIENT_ID = 256


async def read(request: Request, limit_bytes: int | None = None) -> bytes:
    """The body. Raises RequestRefused (413) beyond its bound (MAX_BODY_BYTES unless told otherwise)."""
    limit_bytes = MAX_BODY_BYTES if limit_bytes is None else limit_bytes
    chunks, num_bytes = [], 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > limit_bytes:
            raise RequestRefused(f"the body is larger than {limit_bytes} bytes", 413, code="body_too_large")
        chunks.append(chunk)
    return b"".join(chunks)


def forwarded(request: Request) -> dict[str, str]:
    """The headers that an instance gets."""
    headers = {"Content-Type": "application/json"}
    return headers | {name: request.headers[name] for name in _FORWARDED if name in request.headers}


def client_id(scope: Scope) -> str | None:
    """The id that a client has given its request."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            return str(value[:_MAX_CLIENT_ID], "latin-1")
    return None
