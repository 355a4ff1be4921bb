"""Free ports, and a clear word about a used one."""

from __future__ import annotations

import ipaddress
import random
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from core.errors import ConfigError
from engine.instance import url_of

LOOPBACK = "127.0.0.1"
WILDCARDS = ("0.0.0.0", "::")
LOWEST_PORT = 20_000
MAX_TRIES = 2_000


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
    """Different ports that nobody listens on now.

    Not of those that the kernel gives to outgoing connections: a server binds seconds after its port was chosen, and
    any connection of this machine could take it meanwhile. Where the kernel has them all, one of those has to do.
    """
    found: list[int] = []
    candidates = range(LOWEST_PORT, first_outgoing_port())
    for port in random.sample(candidates, min(len(candidates), MAX_TRIES)):
        if len(found) == count:
            return found
        if _is_free(port, host):
            found.append(port)
    with ExitStack() as stack:
        sockets = [stack.enter_context(_socket(host)) for _ in range(count - len(found))]
        for each in sockets:
            each.bind((host, 0))
        return found + [each.getsockname()[1] for each in sockets]


def first_outgoing_port() -> int:
    """From which on the kernel chooses ports by itself."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return LOWEST_PORT


def _is_free(port: int, host: str) -> bool:
    try:
        with _socket(host) as probe:
            probe.bind((host, port))
    except OSError:
        return False
    return True


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
