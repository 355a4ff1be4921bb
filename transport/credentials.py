"""Who holds the other end of a local socket, as the kernel vouches for it. Pure functions."""

from __future__ import annotations

import socket
import struct

_PEER_CREDENTIALS = struct.Struct("3i")


def peer_pid(connection: socket.socket) -> int:
    """The process that holds the other end (that listened, where we connected); 0 in another process namespace."""
    return _credentials(connection)[0]


def peer_uid(connection: socket.socket) -> int:
    """The user who holds the other end."""
    return _credentials(connection)[1]


def _credentials(connection: socket.socket) -> tuple[int, int, int]:
    """Process, user and group."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    pid, uid, gid = _PEER_CREDENTIALS.unpack(credentials)
    return pid, uid, gid
