"""Blocks in one or several Redis or Valkey servers, each block on `replicas` of them.

    key ──▶ every server weighed by hash(server, key) ──▶ the `replicas` heaviest (rendezvous hashing)
    put ──▶ all of them; one that takes it is enough         get ──▶ the heaviest, then the others
    baton:kv:KEY = | BATONKV + version | arena's digest u64 | payload's length u64 | seal u64 | payload |

A server that failed is left out for 1 s until one call tries it again, then for 2 s, up to 30 s; the others go on.
Nothing is moved when a server joins or leaves: a block whose servers changed is a miss, and put again.
The servers decide what to evict: give them `maxmemory` and `maxmemory-policy allkeys-lru`.

Memory model: `put` hands the caller's memory to the socket without copying it. `get` asks for no more than the block
that fits, plus a byte, so that whatever lies under our key cannot fill this process; its bytes are copied into place
once they have been verified. A server has as many connections as calls go on at once.
Threading: any method from any thread. A call waits at most timeout_s for a connection and as long for each silence of
each server that it asks, one server after another.
"""

from __future__ import annotations

import importlib
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgspec
import xxhash

from core.clock import Clock, SystemClock
from core.errors import ConfigError
from kvcache.breaker import Breaker
from kvcache.keys import BlockKey
from kvcache.tier import TierError, TierFigures, seal

KEY_PREFIX = b"baton:kv:"
_HEADER = struct.Struct("<8sQQQ")
_MAGIC = b"BATONKV\x01"
_DEFAULT_REPLICAS = 2
_DEFAULT_TIMEOUT_S = 0.5
_MOST_CONNECTIONS = 1 << 16
_DEFAULT_PORT = 6379
_EXAMPLE = "write it like redis://127.0.0.1:6379/0"


class Refused(msgspec.Struct, frozen=True):
    """A server's answer that it will not do this."""

    why: str


Answer = bytes | int | Refused | None


class Connection(Protocol):
    """What is used of redis.connection.Connection."""

    def send_packed_command(self, command: Sequence[bytes | memoryview]) -> None: ...

    def read_response(self, disable_decoding: bool) -> object: ...

    def disconnect(self) -> None: ...


class ConnectionPool(Protocol):
    """What is used of redis.connection.ConnectionPool."""

    def get_connection(self) -> Connection: ...

    def release(self, connection: Connection) -> None: ...

    def disconnect(self, inuse_connections: bool) -> None: ...


class RedisTier:
    """See kvcache/tier.py."""

    name = "redis"
    is_written = True

    def __init__(
        self,
        urls: Sequence[str],
        replicas: int | None = None,
        ttl_s: float = 0.0,
        timeout_s: float = _DEFAULT_TIMEOUT_S,
        clock: Clock | None = None,
    ) -> None:
        """Connects to nothing yet. urls: redis://, rediss:// or unix://. replicas: servers per block, at most 2 unless
        told. ttl_s: seconds that a block is kept after it was put, 0 for ever. timeout_s: seconds, see above. Raises
        ConfigError if the client library is missing, or an argument is malformed."""
        _check_times(ttl_s, timeout_s)
        self._servers = [RedisServer(url, timeout_s, clock or SystemClock()) for url in urls]
        self._replicas = min(_DEFAULT_REPLICAS, len(urls)) if replicas is None else replicas
        if len({server.name for server in self._servers}) != len(urls) or not urls:
            raise ConfigError("the Redis tier needs one or more servers, each of them once")
        if not 1 <= self._replicas <= len(urls):
            raise ConfigError(f"{replicas} replicas on {len(urls)} Redis servers: ask for 1 to {len(urls)}")
        self._set_options = (b"NX", b"PX", b"%d" % max(round(ttl_s * 1000), 1)) if ttl_s else (b"NX",)
        self._figures = TierFigures()
        self._figures_lock = threading.Lock()

    def contains(self, keys: Sequence[BlockKey]) -> int:
        """See Tier. One round trip to each server. The count ends where no server of a key answers; raises TierError if
        that is the first key."""
        there, answered, why = set[int](), set[int](), ""
        for server, places in self._places(keys).items():
            command = b"".join(_packed(b"EXISTS", KEY_PREFIX + keys[at]) for at in places)
            try:
                answers = server.ask([command], [int] * len(places))
            except TierError as error:
                why = str(error)
                continue
            answered.update(places)
            there.update(at for at, answer in zip(places, answers, strict=True) if answer)
        first_gap = next((at for at in range(len(keys)) if at not in there), len(keys))
        if keys and first_gap == 0 and 0 not in answered:
            raise TierError(f"no Redis server of a block answers: {why}")
        return first_gap

    def get(self, key: BlockKey, into: memoryview) -> int | None:
        """See Tier. Raises TierError if none of the key's servers answers."""
        failures = []
        servers = self._servers_of(key)
        for server in servers:
            try:
                value = server.read(KEY_PREFIX + key, _HEADER.size + len(into) + 1)
            except TierError as error:
                failures.append(str(error))
                continue
            if value is None:
                continue
            digest = _opened(key, value, into)
            if digest is not None:
                return digest
            self._discard(server, key)
        if len(failures) == len(servers):
            raise TierError(f"no Redis server of a block answers: {'; '.join(failures)}")
        return None

    def put(self, key: BlockKey, digest: int, block: memoryview) -> bool:
        """See Tier. Raises TierError if none of the key's servers takes it."""
        header = _HEADER.pack(_MAGIC, digest, len(block), seal(key, digest, block))
        before, after = _packed_around(len(header) + len(block), b"SET", KEY_PREFIX + key, options=self._set_options)
        failures, answers = [], []
        for server in self._servers_of(key):
            try:
                answers += server.ask([before + header, block, after], [bytes])
            except TierError as error:
                failures.append(str(error))
        if not answers:
            raise TierError(f"no Redis server takes a block: {'; '.join(failures)}")
        if answers[0] is not None:
            self._count(blocks=1, num_bytes=len(block))
        return True

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """See Tier. A copy on a server that does not answer comes back with it. Raises TierError if none of a key's
        servers answers."""
        forgotten, why = set[int](), ""
        for server, places in self._places(keys).items():
            try:
                server.ask([_packed(b"UNLINK", *(KEY_PREFIX + keys[at] for at in places))], [int])
                forgotten.update(places)
            except TierError as error:
                why = str(error)
        if len(forgotten) != len(keys):
            raise TierError(f"no Redis server of a block answers: {why}")

    def figures(self) -> TierFigures:
        """What this object has put and found corrupt; not what the servers hold, which others share and evict from."""
        return self._figures

    def close(self) -> None:
        """Closes the connections; one in use as soon as its call ends. Every later call raises TierError."""
        for server in self._servers:
            server.close()

    def placement(self, key: BlockKey) -> list[str]:
        """The names of a key's servers (host:port/database), in the order in which `get` asks them."""
        return [server.name for server in self._servers_of(key)]

    def _servers_of(self, key: BlockKey) -> list[RedisServer]:
        return sorted(self._servers, key=lambda server: server.weight(key), reverse=True)[: self._replicas]

    def _places(self, keys: Sequence[BlockKey]) -> dict[RedisServer, list[int]]:
        """Of every server, where its keys are in `keys`."""
        places: dict[RedisServer, list[int]] = {}
        for at, key in enumerate(keys):
            for server in self._servers_of(key):
                places.setdefault(server, []).append(at)
        return places

    def _discard(self, server: RedisServer, key: BlockKey) -> None:
        self._count(corrupt=1)
        with suppress(TierError):  # it stays, and is found out again
            server.ask([_packed(b"UNLINK", KEY_PREFIX + key)], [int])

    def _count(self, blocks: int = 0, num_bytes: int = 0, corrupt: int = 0) -> None:
        with self._figures_lock:
            old = self._figures
            self._figures = TierFigures(
                blocks=old.blocks + blocks, num_bytes=old.num_bytes + num_bytes, corrupt=old.corrupt + corrupt
            )


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
        return [answer for answer in answers if not isinstance(answer, Refused)]

    def read(self, name: bytes, most_bytes: int) -> bytes | None:
        """The beginning of what lies under a name, nothing of what is no string, None if there is nothing. Raises
        TierError."""
        command = _packed(b"TYPE", name) + _packed(b"GETRANGE", name, b"0", b"%d" % (most_bytes - 1))
        kind, value = self.exchange([command], [bytes, bytes])
        if kind == b"none":
            return None
        if kind == b"string" and isinstance(value, bytes):
            return value
        if kind != b"string" and isinstance(kind, bytes) and isinstance(value, Refused):
            return b""
        raise TierError(f"{self.name} does not let a block be read: {kind!r}, {value!r}")

    def exchange(self, command: Sequence[bytes | memoryview], kinds: Sequence[type]) -> list[Answer]:
        """One round trip. Raises TierError if the server is left out, gone, silent, or speaks something else."""
        if self._closed:
            raise TierError(f"the connections to {self.name} are closed")
        ticket = self._gate.enter()
        if ticket is None:
            raise TierError(f"{self.name} is left out for a while after it failed")
        try:
            answers = self._exchange(command, kinds)
        except self._failures as error:
            self._gate.failed(ticket)
            raise TierError(f"{self.name}: {error}") from error
        self._gate.good()
        return answers

    def close(self) -> None:
        self._closed = True
        self._pool.disconnect(inuse_connections=False)

    def _exchange(self, command: Sequence[bytes | memoryview], kinds: Sequence[type]) -> list[Answer]:
        connection = self._pool.get_connection()
        in_step = False
        try:
            connection.send_packed_command(command)
            answers = [self._answer(connection, kind) for kind in kinds]
            in_step = True
            return answers
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
        if answer is None or (isinstance(answer, kind) and isinstance(answer, bytes | int)):
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


def _opened(key: BlockKey, value: bytes, into: memoryview) -> int | None:
    """The digest in a value, its payload now in `into`; None if the value is not what was put."""
    if len(value) != _HEADER.size + len(into):
        return None
    magic, digest, num_bytes, sealed = _HEADER.unpack_from(value)
    block = memoryview(value)[_HEADER.size :]
    if magic != _MAGIC or num_bytes != len(block) or sealed != seal(key, digest, block):
        return None
    into[:] = block
    return int(digest)


def _packed(*arguments: bytes) -> bytes:
    """One command in Redis's protocol (RESP2)."""
    return b"*%d\r\n" % len(arguments) + b"".join(b"$%d\r\n%s\r\n" % (len(text), text) for text in arguments)


def _packed_around(num_bytes: int, *arguments: bytes, options: Sequence[bytes]) -> tuple[bytes, bytes]:
    """What goes before and after an argument of num_bytes bytes, so that it need not be copied into the command."""
    num_arguments = len(arguments) + 1 + len(options)
    before = _packed(*arguments).split(b"\r\n", 1)[1]
    after = _packed(*options).split(b"\r\n", 1)[1]
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


def _check_times(ttl_s: float, timeout_s: float) -> None:
    if not ttl_s >= 0:
        raise ConfigError(f"a Redis block's time to live is {ttl_s} s: give seconds, or 0 to keep it")
    if not timeout_s > 0:
        raise ConfigError(f"the Redis tier's timeout is {timeout_s} s: give more than 0")


def _library(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"the Redis tier needs the client library ({error}): pip install redis") from error
