"""ZMTP by hand, for tests: a stranger that speaks just enough of it to be heard, and then goes wrong."""

from __future__ import annotations

import socket
import struct

PUSH, DEALER, ROUTER = 8, 5, 6
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)


def old_greeting(kind: int) -> bytes:
    """Of ZMTP 2.0: the socket's number instead of a handshake, and an empty name; messages may come at once."""
    return b"\xff" + bytes(7) + b"\x01\x7f\x01" + bytes([kind]) + bytes(2)


def ready(kind: bytes) -> bytes:
    """The command after which messages may come."""
    body = b"\x05READY" + b"\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind
    return b"\x04" + bytes([len(body)]) + body


def part(content: bytes, *, more: bool) -> bytes:
    """One part of a message."""
    return bytes([2 | more]) + struct.pack(">Q", len(content)) + content


def stranger(port: int, kind: bytes) -> socket.socket:
    """Connected, through its handshake."""
    connection = socket.create_connection(("127.0.0.1", port), 5)
    connection.sendall(GREETING + ready(kind))
    return connection


def flood(connection: socket.socket, num_bytes: int) -> int:
    """Sends one message without an end; how many bytes went before the connection was shut, num_bytes at most."""
    sent, piece = 0, part(b"z" * (1 << 20), more=True)
    connection.settimeout(1)  # one that was shut may be left to wait for a window that never opens
    try:
        while sent < num_bytes:
            connection.sendall(piece)
            sent += len(piece)
    except OSError:
        return sent
    return sent
