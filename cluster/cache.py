"""The cache server of a cluster or a host: what was asked for, and the process that holds its memory.

The starter makes the arena and holds its descriptors, the server is its child; when the server dies, the supervisor
starts another that takes the same arena over. With the starter everything goes: no file is left in /dev/shm.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cluster.members import Member
from cluster.processes import start_child
from core.errors import ConfigError, TransferError
from engine.instance import source_path
from kvcache.client import ask_figures
from kvcache.server import ArenaFds
from kvcache.spec import SPEC_VARIABLE, CacheSpec

LONGEST_SOCKET = 100


class CacheMember(Member):
    """A cache server of this launcher. Raises TransferError if there is no memory for its arena."""

    def __init__(self, spec: CacheSpec, folder: Path, socket: Path | None = None) -> None:
        self.socket = socket or socket_path(spec, folder)
        if len(str(self.socket)) > LONGEST_SOCKET:
            raise ConfigError(f"{self.socket} is longer than a socket's path may be ({LONGEST_SOCKET} characters)")
        self._fds = fds = ArenaFds(spec.num_bytes)
        log = folder / "cache.log"
        command = [sys.executable, "-P", "-m", "kvcache", "--socket", str(self.socket)]
        command += ["--arena-fd", str(fds.arena), "--ledger-fd", str(fds.ledger)]
        variables = {"PYTHONPATH": source_path(), SPEC_VARIABLE: spec.text}
        super().__init__("cache", log, lambda: start_child(command, variables, log, (fds.arena, fds.ledger)))

    def is_ready(self) -> bool:
        return figures_of(str(self.socket)) is not None

    def release(self) -> None:
        """Called after the server was stopped: the arena goes with the last engine that maps it."""
        self._fds.close()


def socket_path(spec: CacheSpec, folder: Path) -> Path:
    """Where a cluster's cache server listens: the one that runs already, or its own."""
    return Path(spec.socket) if spec.socket else folder / "cache.sock"


def socket_of(text: str) -> str:
    """The socket that `--cache` names for one more instance. Raises ConfigError if it is a size, or nobody answers."""
    socket = CacheSpec.parse(text).socket
    if not socket:
        raise ConfigError(f"--cache {text}: one instance shares a cache server that runs: --cache unix:/its/socket")
    if figures_of(socket) is None:
        raise ConfigError(f"no cache server answers at {socket}; start one: baton cache serve 8GiB")
    return socket


def figures_of(socket: str) -> dict[str, float] | None:
    """What the server at this socket says of itself; None where nobody answers."""
    try:
        return ask_figures(socket)
    except TransferError:
        return None
