"""TCP connections that never wait, and that end when the other host is silent: what nixl and ucx speak over.

Memory and threading: none of its own.
"""

from __future__ import annotations

import errno
import os
import socket

from core.errors import TransferError

KEEPALIVE_IDLE_S = 5
KEEPALIVE_INTERVAL_S = 2
KEEPALIVE_PROBES = 3
SILENT_AFTER_MS = 11_000
"""A peer whose kernel acknowledges nothing for so long is given up by both ends."""


def prepare(connection: socket.socket) -> None:
    """From now on nothing waits on it, small words leave at once, and it ends SILENT_AFTER_MS after the other host has
    said its last."""
    connection.setblocking(False)
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_AFTER_MS),
    ):
        connection.setsockopt(level, option, value)


def begin_to_connect(address: str) -> socket.socket:
    """Towards tcp://host:port, the host as a number (IPv6 in brackets); the socket is writable once that has succeeded
    or failed. Raises TransferError if it is impossible from here."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    try:
        numeric = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=numeric)
        family, kind, protocol, _, target = found[0]
        connection = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise TransferError(f"cannot connect to {address}: {error}") from error
    connection.setblocking(False)
    code = connection.connect_ex(target)
    if code not in (0, errno.EINPROGRESS):
        connection.close()
        raise TransferError(f"cannot connect to {address}: {os.strerror(code)}")
    return connection
