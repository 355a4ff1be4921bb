"""Free ports, and a clear word about a used one."""

from __future__ import annotations

import ipaddress
import socket
from contextlib import ExitStack
from typing import NamedTuple

from core.errors import ConfigError
from engine.instance import url_of

LOOPBACK = "127.0.0.1"
WILDCARDS = ("0.0.0.0", "::")


class Address(NamedTuple):
    """Where a server listens."""

    host: str
    port: int

    @property
    def url(self) -> str:
        return url_of(self.host, self.port)

    @property
    def local_url(self) -> str:
        """By which processes of this machine reach it, also where it listens on every interface."""
        return url_of(LOOPBACK if self.host in WILDCARDS else self.host, self.port)


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def free_ports(count: int, host: str) -> list[int]:
    """Different ports that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(_socket(host)) for _ in range(count)]
        for each in sockets:
            each.bind((host, 0))
        return [each.getsockname()[1] for each in sockets]


def check_free(port: int, host: str) -> None:
    """Raises ConfigError if a server could not listen there."""
    if not 0 < port < 65536:
        raise ConfigError(f"port {port} is not between 1 and 65535")
    try:
        with _socket(host) as probe:
            probe.bind((host, port))
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another with --port"
        ) from error


def _socket(host: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    result = socket.socket(family, socket.SOCK_STREAM)
    result.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return result
