"""Bounds what strangers can make libzmq keep: a message that never ends, many large ones, too many connections.

libzmq keeps every part of a message until its last one has come, without a limit; its own bounds count whole messages
of one connection. So the kernel is asked how many bytes a connection has received (TCP_INFO); one that is too far ahead
of what was taken from it is shut down, and libzmq then drops what it kept.

    received:  ├─ messages that were taken ─┤├─ untaken: whole messages, and parts of one ─┤

Memory model: one small record per connection, at most `max_connections`. Between two checks a peer can send what its
line carries in that time; beyond that nothing is kept of it.
Threading: the socket's owner. A descriptor belongs to libzmq and may be closed or given to somebody else at any moment:
each look takes a duplicate, and looks at it only if it is the very connection that was opened.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import zmq

_BYTES_RECEIVED = struct.Struct("=128xQ")
"""tcp_info.tcpi_bytes_received of <linux/tcp.h>, since Linux 4.1."""

_PART_COST_BYTES = 64
"""What CURVE and ZMTP add to a part, and some more: a connection is never charged for what it did not send."""


@dataclass(frozen=True)
class IntakeLimits:
    """connection_bytes, total_bytes: untaken, of one connection and of all."""

    connection_bytes: int
    total_bytes: int
    max_connections: int = 1024


@dataclass
class _Connection:
    """ends: both names in the kernel."""

    ends: object
    taken_bytes: int = 0
    untaken_bytes: int = 0


class Intake:
    """The connections of one socket that listens at, or is connected to, `port`."""

    def __init__(self, port: int, limits: IntakeLimits) -> None:
        self._port = port
        self._limits = limits
        self._connections: dict[int, _Connection] = {}
        self._taken: dict[int, int] = {}
        self.num_cut = 0

    def __len__(self) -> int:
        return len(self._connections)

    def opened(self, fd: int) -> None:
        """A connection was opened under this descriptor; one too many is shut down."""
        self._connections.pop(fd, None)
        with _duplicate(fd) as duplicate:
            ends = self._ends_of(duplicate)
            if duplicate is None or ends is None:
                return
            if len(self._connections) < self._limits.max_connections:
                self._connections[fd] = _Connection(ends)
                return
            self._shut(duplicate)

    def closed(self, fd: int) -> None:
        """A connection has ended."""
        self._connections.pop(fd, None)

    def took(self, part: zmq.Frame, num_bytes: int, num_parts: int = 1) -> bool:
        """A whole message was taken, of which this is a part that came over the line. False: it is to be dropped:
        libzmq cannot say over which connection it came; its sender, no process of ours, speaks a ZMTP older than 3."""
        try:
            fd = int(part.get(zmq.SRCFD))
        except zmq.ZMQError:
            return False
        self.took_from(fd, num_bytes, num_parts)
        return True

    def took_from(self, fd: int, num_bytes: int, num_parts: int) -> None:
        """As `took`, where the connection is known."""
        self._taken[fd] = self._taken.get(fd, 0) + num_bytes + num_parts * _PART_COST_BYTES

    def check(self) -> int:
        """Shuts down what is beyond its limit; how many that were."""
        before = self.num_cut
        total_bytes = sum(self._look(fd) for fd in list(self._connections))
        self._taken.clear()
        for fd, connection in sorted(self._connections.items(), key=lambda item: -item[1].untaken_bytes):
            is_small = connection.untaken_bytes <= self._limits.connection_bytes
            if is_small and total_bytes <= self._limits.total_bytes:
                break
            total_bytes -= connection.untaken_bytes
            self._cut(fd, connection)
        return self.num_cut - before

    def _look(self, fd: int) -> int:
        """How many untaken bytes this connection has; it is forgotten if it is not what it was."""
        connection = self._connections[fd]
        with _duplicate(fd) as duplicate:
            if duplicate is None or self._ends_of(duplicate) != connection.ends:
                del self._connections[fd]
                return 0
            received_bytes = _received_bytes(duplicate)
        taken_bytes = connection.taken_bytes + self._taken.get(fd, 0)
        connection.taken_bytes = min(taken_bytes, received_bytes)
        connection.untaken_bytes = received_bytes - connection.taken_bytes
        return connection.untaken_bytes

    def _cut(self, fd: int, connection: _Connection) -> None:
        del self._connections[fd]
        with _duplicate(fd) as duplicate:
            if duplicate is not None and self._ends_of(duplicate) == connection.ends:
                self._shut(duplicate)

    def _shut(self, duplicate: socket.socket) -> None:
        self.num_cut += 1
        with contextlib.suppress(OSError):
            duplicate.shutdown(socket.SHUT_RDWR)

    def _ends_of(self, duplicate: socket.socket | None) -> object:
        """Both names of a connection of ours; None if it is none."""
        if duplicate is None:
            return None
        try:
            near, far = duplicate.getsockname(), duplicate.getpeername()
        except OSError:
            return None
        is_ours = isinstance(near, tuple) and self._port in (near[1], far[1])
        return (near, far) if is_ours else None


@contextlib.contextmanager
def _duplicate(fd: int) -> Iterator[socket.socket | None]:
    """The same connection under a descriptor of our own; None if there is none (any more)."""
    try:
        duplicate_fd = os.dup(fd)
    except OSError:
        yield None
        return
    try:
        duplicate = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, duplicate_fd)
    except OSError:  # no socket: the descriptor is somebody else's by now
        os.close(duplicate_fd)
        yield None
        return
    with duplicate:
        yield duplicate


def _received_bytes(duplicate: socket.socket) -> int:
    """Since the connection was opened; 0 where the kernel does not tell."""
    try:
        told = duplicate.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED.size)
        return int(_BYTES_RECEIVED.unpack(told)[0])
    except (OSError, struct.error):
        return 0
