"""Addresses of sockets: which are well-formed (they come from tickets), and where to bind.

Memory and threading: pure functions; `bind_address` may ask the resolver, and is called at start only.
"""

from __future__ import annotations

import re
import socket

from core.errors import ConfigError

_ADDRESS = re.compile(
    r"tcp://(?P<host>[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252})|\[[0-9A-Fa-f:.]{2,45}\]):(?P<port>[0-9]{1,5})"
)


def is_address(address: str) -> bool:
    """Whether this is `tcp://host:port` and nothing else that ZMQ would also accept (wildcards, sources, paths)."""
    match = _ADDRESS.fullmatch(address)
    return match is not None and 1 <= int(match["port"]) <= 65535


def bind_address(host: str) -> str:
    """What to bind on a host of ours, port chosen by the system. Raises ConfigError if no peer could reach it."""
    if host in ("", "*", "0.0.0.0", "::"):
        raise ConfigError(
            f"host {host!r} is no address that peers can connect to; name one of this machine's addresses"
        )
    try:
        family, _, _, _, resolved = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host {host!r} is unknown: {error}") from error
    numeric = f"[{resolved[0]}]" if family == socket.AF_INET6 else str(resolved[0])
    return f"tcp://{numeric}:*"
