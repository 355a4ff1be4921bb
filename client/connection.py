"""What both clients share of the network: options, httpx's errors in our words, the wait before another try."""

from __future__ import annotations

import random
from typing import TypedDict

import httpx
import msgspec

from client.answers import Generation
from client.errors import BatonClientError, Busy, NotReached, TimedOut
from client.events import EventReader
from client.operations import Answer, Defaults, Operation, T

DEFAULT_URL = "http://127.0.0.1:8000"
_CONNECT_TIMEOUT_S = 5.0
_FIRST_WAIT_S = 0.25
_LONGEST_WAIT_S = 20.0


class Options(TypedDict, total=False):
    """api_key: a tenant of its own. cache_salt: whose contexts and caches, instead of the key's. model: if several are
    served. timeout_s: how long the server may be silent (600). max_retries: on 429, 503, refused connections (4)."""

    api_key: str | None
    cache_salt: str | None
    model: str | None
    timeout_s: float
    max_retries: int


class Connection(msgspec.Struct, frozen=True):
    """Everything about a client that does not change."""

    url: str
    defaults: Defaults
    headers: dict[str, str]
    timeout_s: float = 600.0
    max_retries: int = 4

    @classmethod
    def of(cls, url: str, options: Options) -> Connection:
        key = options.get("api_key")
        return cls(
            url=url.rstrip("/"),
            defaults=Defaults(options.get("model"), options.get("cache_salt")),
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout_s=options.get("timeout_s", 600.0),
            max_retries=options.get("max_retries", 4),
        )

    @property
    def timeout(self) -> httpx.Timeout:
        return httpx.Timeout(self.timeout_s, connect=_CONNECT_TIMEOUT_S)

    @property
    def limits(self) -> httpx.Limits:
        """None: how many are under way is the caller's choice, and the server has a bound of its own."""
        return httpx.Limits(max_connections=None)

    def wait_s(self, attempt: int, error: BatonClientError, dice: random.Random) -> float | None:
        """Before the next try, or None if there is none: only what was not served is asked again."""
        if attempt >= self.max_retries or not (isinstance(error, Busy) or _was_refused(error)):
            return None
        wait_s: float = max(_FIRST_WAIT_S * 2.0**attempt, error.retry_after_s or 0.0)
        return min(wait_s, _LONGEST_WAIT_S) * (1.0 + dice.random() / 4)


def request_of(operation: Operation[T]) -> tuple[str, str, dict[str, str], bytes | None]:
    """Method, path, headers and bytes."""
    body = msgspec.json.encode(operation.body) if operation.body is not None else None
    headers = operation.headers | ({"content-type": "application/json"} if body is not None else {})
    return operation.method, operation.path, headers, body


def answer_of(response: httpx.Response) -> Answer:
    return Answer(response.status_code, headers_of(response), response.content)


def headers_of(response: httpx.Response) -> dict[str, str]:
    return {name.lower(): value for name, value in response.headers.items()}


def translated(error: httpx.HTTPError, url: str) -> BatonClientError:
    """httpx's error in our words."""
    if isinstance(error, httpx.ConnectError):
        return NotReached(f"cannot reach {url}: {error}; is it running?")
    if isinstance(error, httpx.TimeoutException):
        return TimedOut(f"{url} was silent for too long ({type(error).__name__})")
    return NotReached(f"the connection to {url} broke off: {error or type(error).__name__}")


def _was_refused(error: BatonClientError) -> bool:
    return isinstance(error, NotReached) and isinstance(error.__cause__, httpx.ConnectError)


class StreamedAnswer:
    """What the streams of both clients have in common. `generation` is there when the texts have been read to the
    end."""

    def __init__(self, response: httpx.Response, url: str) -> None:
        self._response = response
        self._url = url
        self._reader = EventReader(headers_of(response))
        self._generation: Generation | None = None

    @property
    def generation(self) -> Generation:
        """Everything that was said. Raises BatonClientError before the end."""
        if self._generation is None:
            raise BatonClientError("the stream has not been read to its end")
        return self._generation
