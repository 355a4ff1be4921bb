"""A value's bytes from a Redis server straight into the caller's memory: redis-py would copy them three times.

    server ──▶ "+string" ──▶ "$3670048" ──▶ | header | payload | "\r\n"
                 TYPE          GETRANGE       └ room ┘ └ room ─┘

The client library connects, authenticates and encrypts; only this one answer is read past its parser, which has
nothing in hand between two exchanges. Protocol: https://redis.io/docs/latest/develop/reference/protocol-spec (RESP2).

Memory model: allocates 64 bytes. Threading: runs in the thread of whoever has the connection.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence

from kvcache.tier import TierError

Room = Callable[[int], Sequence[memoryview] | None]
"""Memory for a value of so many bytes, or None if no such value is wanted."""

_LINE_END = b"\r\n"
_LONGEST_LINE_BYTES = 1024
_LONGEST_LENGTH = 20
_LOOK_AHEAD_BYTES = 64


class Unfit(TierError):
    """What lies there is no value that was wanted; the connection is out of step, unless it says so."""


def read_value(connection: socket.socket, room: Room) -> bool:
    """Reads the answers to TYPE and GETRANGE. False if nothing lies there. Raises Unfit if it is no string or `room`
    does not want its size, TierError if the server refuses, ValueError if this is not Redis's protocol, and OSError."""
    answers = _Answers(connection)
    kind = answers.line()
    if kind[:1] == b"-":
        raise TierError(f"it does not let a block be read: {_shown(kind[1:])}")
    if kind[:1] != b"+":
        raise ValueError(f"answered {_shown(kind)} where a type was due")
    head = answers.line()
    if kind == b"+none" and head == b"$0":
        answers.expect_end()
        return False
    if kind != b"+string" and head[:1] == b"-":
        raise Unfit(f"what lies there is a {_shown(kind[1:])}")
    if kind != b"+string" or head[:1] != b"$" or not head[1:].isdigit() or len(head) > _LONGEST_LENGTH:
        raise ValueError(f"answered {_shown(head)} where a value was due")
    pieces = room(int(head[1:]))
    if pieces is None:
        raise Unfit(f"a value of {int(head[1:])} bytes")
    for piece in pieces:
        answers.fill(piece)
    answers.expect_end()
    return True


def _shown(line: bytes) -> str:
    return line[:80].decode(errors="replace")


class _Answers:
    """What a connection says. Looks ahead by a few bytes at a time: a value's own bytes go where they belong."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._ahead = b""

    def line(self) -> bytes:
        """The next line. Raises ValueError if it does not end."""
        while _LINE_END not in self._ahead:
            if len(self._ahead) > _LONGEST_LINE_BYTES:
                raise ValueError(f"answered a line that does not end: {self._ahead[:40]!r}")
            self._ahead += self._received(_LOOK_AHEAD_BYTES)
        line, self._ahead = self._ahead.split(_LINE_END, 1)
        return line

    def expect_end(self) -> None:
        """A value's. Raises ValueError if there is more of it."""
        if self.line() != b"":
            raise ValueError("a value is longer than its length says")

    def fill(self, memory: memoryview) -> None:
        """The next bytes, as many as the memory has."""
        num_ahead = min(len(self._ahead), len(memory))
        memory[:num_ahead] = self._ahead[:num_ahead]
        self._ahead = self._ahead[num_ahead:]
        rest = memory[num_ahead:]
        while rest:
            num_bytes = self._connection.recv_into(rest)
            if not num_bytes:
                raise ConnectionError("the server closed the connection")
            rest = rest[num_bytes:]

    def _received(self, most_bytes: int) -> bytes:
        received = self._connection.recv(most_bytes)
        if not received:
            raise ConnectionError("the server closed the connection")
        return received
