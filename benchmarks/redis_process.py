"""A Redis server for the length of a benchmark: it keeps everything in memory and nothing on disk."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.ports import LOOPBACK, free_ports
from cluster.processes import start_child, stop_groups
from core.errors import BatonError, ConfigError

START_TIMEOUT_S = 10.0
_POLL_S = 0.02


def redis_binary() -> str:
    """Its path. Raises ConfigError where no server is installed."""
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found is None:
        raise ConfigError("no redis-server on this machine: apt-get install redis-server, or leave redis out")
    return found


@contextmanager
def redis_server(folder: Path) -> Iterator[int]:
    """The port of a server that answers. Raises BatonError if it does not come up."""
    (port,) = free_ports(1, LOOPBACK)
    command = [redis_binary(), "--bind", LOOPBACK, "--port", str(port), "--save", "", "--appendonly", "no"]
    child = start_child([*command, "--dir", str(folder)], {}, folder / f"redis-{port}.log")
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers(port):
            if child.poll() is not None or time.monotonic() > deadline:
                raise BatonError(f"redis-server did not start on port {port}")
            time.sleep(_POLL_S)
        yield port
    finally:
        stop_groups([child])


def _answers(port: int) -> bool:
    try:
        with socket.create_connection((LOOPBACK, port), timeout=1.0) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False
