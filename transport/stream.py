"""Bytes over TCP for whoever asks: short messages, and blocks that go straight from memory into memory.

    asker (any thread) ── message ──────────────────▶ holder (a thread per connection)
                       ◀── message, a block's bytes ──

Nothing here is one-sided, as `Endpoint.write` is: the reader's own thread puts the bytes in place, and none are put
there once its call has returned. That is the whole fence. Both ends hash a block chunk by chunk, while it is in the
processor's cache.

Memory model: nothing is copied but into and out of the kernel. A message has at most MAX_MESSAGE_BYTES.
Threading: a stream belongs to one thread at a time; `close` may come from another and ends what waits. Every wait has a
limit.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import xxhash

from core.errors import BatonError, ConfigError, TransferError

CHUNK_BYTES = 256 << 10
MAX_MESSAGE_BYTES = 4096
ACCEPT_PAUSE_S = 0.1
_LENGTH = struct.Struct("<H")


class Stream:
    """One connection. Every method raises TransferError if the other end is gone or late; then the stream is of no use
    any more."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection

    @classmethod
    def connect(cls, host: str, port: int, timeout_s: float) -> Stream:
        """Raises TransferError if nobody answers there in time."""
        try:
            return cls(socket.create_connection((host, port), timeout_s))
        except (OSError, UnicodeError) as error:
            raise TransferError(f"cannot connect to {host}:{port}: {error}") from error

    def send(self, message: bytes, timeout_s: float) -> None:
        """One message."""
        self._send(_LENGTH.pack(len(message)) + message, _Limit(timeout_s))

    def receive(self, timeout_s: float) -> bytes:
        """The next message."""
        limit = _Limit(timeout_s)
        head = bytearray(_LENGTH.size)
        self._fill(memoryview(head), limit)
        (num_bytes,) = _LENGTH.unpack(head)
        if num_bytes > MAX_MESSAGE_BYTES:
            raise TransferError(f"a message of {num_bytes} bytes is larger than {MAX_MESSAGE_BYTES}")
        message = bytearray(num_bytes)
        self._fill(memoryview(message), limit)
        return bytes(message)

    def send_block(self, block: memoryview, timeout_s: float) -> int:
        """Sends bytes; returns their xxh3-64."""
        limit, digest = _Limit(timeout_s), xxhash.xxh3_64()
        for at in range(0, len(block), CHUNK_BYTES):
            chunk = block[at : at + CHUNK_BYTES]
            self._send(chunk, limit)
            digest.update(chunk)
        return digest.intdigest()

    def receive_block(self, into: memoryview, timeout_s: float) -> int:
        """Fills `into`; returns the xxh3-64 of what is there."""
        limit, digest = _Limit(timeout_s), xxhash.xxh3_64()
        for at in range(0, len(into), CHUNK_BYTES):
            chunk = into[at : at + CHUNK_BYTES]
            self._fill(chunk, limit)
            digest.update(chunk)
        return digest.intdigest()

    def close(self) -> None:
        """May be called again, and from any thread."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _send(self, piece: bytes | memoryview, limit: _Limit) -> None:
        try:
            self._connection.settimeout(limit.remaining_s())
            self._connection.sendall(piece)
        except OSError as error:
            raise TransferError(f"the connection broke: {error}") from error

    def _fill(self, into: memoryview, limit: _Limit) -> None:
        at = 0
        while at < len(into):
            num_bytes = self._receive_into(into[at:], limit)
            if num_bytes == 0:
                raise TransferError("the connection has ended")
            at += num_bytes

    def _receive_into(self, into: memoryview, limit: _Limit) -> int:
        try:
            self._connection.settimeout(limit.remaining_s())
            return self._connection.recv_into(into)
        except OSError as error:
            raise TransferError(f"the connection broke: {error}") from error


class StreamServer:
    """Listens on a host of ours, at a port of its own; `serve` is called for every stream, in a thread of the stream's.

    What `serve` raises of our own errors ends its stream. Connections beyond max_streams are closed at once. Raises
    ConfigError if it cannot listen.
    """

    def __init__(self, host: str, serve: Callable[[Stream], None], max_streams: int) -> None:
        self._serve = serve
        self._max_streams = max_streams
        self._lock = threading.Lock()
        self._streams: set[Stream] = set()
        self._closing = threading.Event()
        try:
            family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
            self._listener = socket.create_server((host, 0), family=family)
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"cannot listen on {host!r}: {error}") from error
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._accept, name="baton-stream-accept", daemon=True)

    def start(self) -> None:
        """Begins to accept."""
        self._thread.start()

    def close(self) -> None:
        """Ends every stream; threads that serve one end as soon as they notice."""
        self._closing.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:  # no descriptor is left, or this is the end
                self._closing.wait(ACCEPT_PAUSE_S)
                continue
            stream = Stream(connection)
            with self._lock:
                is_welcome = len(self._streams) < self._max_streams and not self._closing.is_set()
                if is_welcome:
                    self._streams.add(stream)
            if is_welcome:
                threading.Thread(target=self._run, args=(stream,), name="baton-stream", daemon=True).start()
            else:
                stream.close()

    def _run(self, stream: Stream) -> None:
        try:
            self._serve(stream)
        except BatonError:
            return
        finally:
            stream.close()
            with self._lock:
                self._streams.discard(stream)


class _Limit:
    """Until when something has to be done."""

    def __init__(self, timeout_s: float) -> None:
        self._until_s = time.monotonic() + timeout_s

    def remaining_s(self) -> float:
        """More than 0. Raises TransferError if nothing is left."""
        remaining_s = self._until_s - time.monotonic()
        if remaining_s <= 0:
            raise TransferError("it took too long")
        return remaining_s
