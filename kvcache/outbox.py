"""Words on their way into one socket, in order, from any thread and without waiting.

    put ─────────────────▶ socket      what it takes at once: waking a thread would take longer than that
     └──▶ queue ── next ─▶ socket      the rest, and all that comes after it, by the thread that waits for the socket

Memory model: at most MAX_BYTES queue. Threading: `put` from any thread; `next` by the one thread that then sends what
it was given, all of it, before it asks again.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque

MAX_BYTES = 4 << 20


class Outbox:
    """Of one connection after the other; nothing of one goes into the next."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self._queue: deque[bytes] = deque()
        self._num_bytes = 0
        self._is_behind = False

    def open(self, connection: socket.socket) -> None:
        """From now on into this socket, which does not block."""
        with self._lock:
            self._connection = connection

    def close(self) -> None:
        """From now on nowhere. To be called before the socket is closed, so that nothing goes to what has its number
        next."""
        with self._lock:
            self._connection = None
            self._queue.clear()
            self._num_bytes = 0
            self._is_behind = False

    def put(self, data: bytes) -> bool:
        """False if it goes nowhere: there is no socket, or the peer does not read."""
        with self._lock:
            if self._connection is None or self._num_bytes + len(data) > MAX_BYTES:
                return False
            rest = data if self._is_behind else data[_sent(self._connection, data) :]
            if rest:
                self._is_behind = True
                self._queue.append(rest)
                self._num_bytes += len(rest)
            return True

    @property
    def is_behind(self) -> bool:
        """Whether there is something for `next`."""
        return self._is_behind

    def next(self) -> memoryview:
        """What is to be sent; empty if `put` may go ahead by itself."""
        with self._lock:
            rest = b"".join(self._queue)
            self._is_behind = bool(rest)
            self._queue.clear()
            self._num_bytes = 0
            return memoryview(rest)


def _sent(connection: socket.socket, data: bytes) -> int:
    with contextlib.suppress(OSError):  # full; or broken, which whoever reads from it will see
        return connection.send(data)
    return 0
