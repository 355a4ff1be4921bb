"""One Redis or Valkey server: its connections, its answers, and when it is left out after it has failed.

Memory model: a command's memoryviews go to the socket without being copied, a value's bytes from it into the caller's
memory. An answer is no larger than was asked for.
Threading: any method from any thread; as many connections as calls go on at once.
"""

from __future__ import annotations

import importlib
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgspec
import xxhash

from core.clock import Clock
from core.errors import ConfigError
from kvcache.breaker import Breaker
from kvcache.keys import BlockKey
from kvcache.redis_value import Room, Unfit, read_value
from kvcache.tier import TierError

KEY_PREFIX = b"baton:kv:"
_MOST_CONNECTIONS = 1 << 16
_DEFAULT_PORT = 6379
_EXAMPLE = "write it like redis://127.0.0.1:6379/0"


class Refused(msgspec.Struct, frozen=True):
    """A server's answer that it will not do this."""

    why: str


Answer = bytes | int | list[Any] | Refused | None


class Connection(Protocol):
    """What is used of redis.connection.Connection."""

    def send_packed_command(self, command: Sequence[bytes | memoryview]) -> None: ...

    _sock: socket.socket

    def read_response(self, disable_decoding: bool) -> object: ...

    def disconnect(self) -> None: ...


class ConnectionPool(Protocol):
    """What is used of redis.connection.ConnectionPool."""

    def get_connection(self) -> Connection: ...

    def release(self, connection: Connection) -> None: ...

    def disconnect(self, inuse_connections: bool) -> None: ...


class RedisServer:
    """One server: its connections, and whether it is worth asking."""

    def __init__(self, url: str, timeout_s: float, clock: Clock) -> None:
        """Raises ConfigError."""
        self.name, self._pool = _open_pool(url, timeout_s)
        self._seed = xxhash.xxh3_64_intdigest(self.name.encode())
        self._gate = Gate(clock)
        self._closed = False
        exceptions = _library("redis.exceptions")
        self._refusal: type[Exception] = exceptions.ResponseError
        # The library lets through what `int()` and its buffers say to an answer that is not Redis's protocol.
        self._failures = (exceptions.RedisError, OSError, ValueError, ArithmeticError, RecursionError)

    def weight(self, key: BlockKey) -> int:
        """How much this server wants a key: a different order of servers for every key."""
        return xxhash.xxh3_64_intdigest(key, self._seed)

    def ask(self, command: Sequence[bytes | memoryview], kinds: Sequence[type]) -> list[bytes | int | None]:
        """Sends commands in Redis's protocol and returns an answer of each kind, or None for a nil. Raises TierError if
        one is refused; otherwise as `exchange`."""
        answers = self.exchange(command, kinds)
        refused = next((answer for answer in answers if isinstance(answer, Refused)), None)
        if refused:
            raise TierError(f"{self.name} refuses: {refused.why}")
        return [answer for answer in answers if not isinstance(answer, Refused | list)]

    def read(self, name: bytes, most_bytes: int, room: Room) -> bool:
        """Puts what lies under a name, its first most_bytes, where `room` says. False if nothing is there. Raises Unfit
        if it is nothing that is wanted, otherwise as `exchange`."""
        command = packed(b"TYPE", name) + packed(b"GETRANGE", name, b"0", b"%d" % (most_bytes - 1))
        with self._connected() as connection:
            connection.send_packed_command([command])
            return read_value(connection._sock, room)  # redis-py has no other way to read into the caller's memory

    def clear(self) -> None:
        """Removes everything under our prefix, a part at a time so that others are served in between. Raises
        TierError."""
        cursor = b"0"
        while True:
            command = packed(b"SCAN", cursor, b"MATCH", KEY_PREFIX + b"*", b"COUNT", b"1000")
            (answer,) = self.exchange([command], [list])
            cursor, names = self._scanned(answer)
            if names:
                self.ask([packed(b"UNLINK", *names)], [int])
            if cursor == b"0":
                return

    def _scanned(self, answer: Answer) -> tuple[bytes, list[bytes]]:
        """What SCAN says: where to go on, and names."""
        if isinstance(answer, list) and len(answer) == 2:
            cursor, names = answer
            if isinstance(cursor, bytes) and isinstance(names, list) and all(isinstance(n, bytes) for n in names):
                return cursor, names
        raise TierError(f"{self.name} does not list its blocks: {answer!r}")

    def exchange(self, command: Sequence[bytes | memoryview], kinds: Sequence[type]) -> list[Answer]:
        """One round trip. Raises TierError if the server is left out, gone, silent, or speaks something else."""
        with self._connected() as connection:
            connection.send_packed_command(command)
            return [self._answer(connection, kind) for kind in kinds]

    def close(self) -> None:
        self._closed = True
        self._pool.disconnect(inuse_connections=False)

    @contextmanager
    def _connected(self) -> Iterator[Connection]:
        """A connection for one exchange, which is not kept if the exchange fails. Raises TierError, see `exchange`."""
        if self._closed:
            raise TierError(f"the connections to {self.name} are closed")
        ticket = self._gate.enter()
        if ticket is None:
            raise TierError(f"{self.name} is left out for a while after it failed")
        try:
            with self._borrowed() as connection:
                yield connection
        except self._failures as error:
            self._gate.failed(ticket)
            raise TierError(f"{self.name}: {error}") from error
        except Unfit:
            self._gate.good()
            raise
        except TierError as error:
            self._gate.good()
            raise TierError(f"{self.name}: {error}") from error
        self._gate.good()

    @contextmanager
    def _borrowed(self) -> Iterator[Connection]:
        connection = self._pool.get_connection()
        in_step = False
        try:
            yield connection
            in_step = True
        finally:
            if not in_step:
                connection.disconnect()
            self._pool.release(connection)
            if self._closed:
                self._pool.disconnect(inuse_connections=False)

    def _answer(self, connection: Connection, kind: type) -> Answer:
        try:
            answer = connection.read_response(disable_decoding=True)
        except self._refusal as error:
            return Refused(str(error))
        if answer is None or (isinstance(answer, kind) and isinstance(answer, bytes | int | list)):
            return answer
        raise ValueError(f"answered {type(answer).__name__} where {kind.__name__} was due")


class Gate:
    """A breaker that many threads ask, and that opens at the first failure."""

    def __init__(self, clock: Clock) -> None:
        self._breaker = Breaker(clock)
        self._lock = threading.Lock()
        self._num_failures = 0

    def enter(self) -> int | None:
        """A ticket for one try, or None while the server is left out."""
        with self._lock:
            return self._num_failures if self._breaker.allows() else None

    def good(self) -> None:
        with self._lock:
            self._breaker.good()

    def failed(self, ticket: int) -> None:
        """Threads that waited for the same silence double the pause once."""
        with self._lock:
            if ticket != self._num_failures:
                return
            self._num_failures += 1
            self._breaker.bad()
            while not self._breaker.is_open:
                self._breaker.bad()


def packed(*arguments: bytes) -> bytes:
    """One command in Redis's protocol (RESP2)."""
    return b"*%d\r\n" % len(arguments) + b"".join(b"$%d\r\n%s\r\n" % (len(text), text) for text in arguments)


def packed_around(num_bytes: int, *arguments: bytes, options: Sequence[bytes]) -> tuple[bytes, bytes]:
    """What goes before and after an argument of num_bytes bytes, so that it need not be copied into the command."""
    num_arguments = len(arguments) + 1 + len(options)
    before = packed(*arguments).split(b"\r\n", 1)[1]
    after = packed(*options).split(b"\r\n", 1)[1]
    return b"*%d\r\n%s$%d\r\n" % (num_arguments, before, num_bytes), b"\r\n" + after


def _open_pool(url: str, timeout_s: float) -> tuple[str, ConnectionPool]:
    """A server's name, which holds no password, and its pool; what we need wins over options in the URL. Raises
    ConfigError."""
    connection = _library("redis.connection")
    try:
        address = _address(url)
        options: dict[str, Any] = connection.parse_url(url)
        options |= {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s, "protocol": 2, "retry": None}
        options |= {"retry_on_timeout": False, "health_check_interval": 0, "driver_info": None}
        options["max_connections"] = _MOST_CONNECTIONS
        options.pop("retry_on_error", None)
        pool = connection.ConnectionPool(**options)
        pool.connection_class(**pool.connection_kwargs)  # connects to nothing, and knows what options there are
    except (ValueError, TypeError, _library("redis.exceptions").RedisError) as error:
        raise ConfigError(f"a Redis server's URL is malformed ({error}): {_EXAMPLE}") from error
    return f"{address}/{options.get('db', 0)}", pool


def _address(url: str) -> str:
    """host:port, or a socket's path. Raises ValueError where the library would assume something in silence."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        if not parts.path:
            raise ValueError("no path of a socket")
        return parts.path
    try:
        port = parts.port or _DEFAULT_PORT
    except ValueError:
        raise ValueError("the port is not a number up to 65535") from None  # its own words may hold a password's end
    if not parts.hostname:
        raise ValueError("no host")
    if parts.path.strip("/") and not parts.path.strip("/").isdecimal():
        raise ValueError("the database is not a number")
    return f"{parts.hostname}:{port}"


def _library(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"the Redis tier needs the client library ({error}): pip install redis") from error
