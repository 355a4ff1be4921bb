"""The cache server of a cluster or a host: what was asked for, and the process that holds its memory.

The starter makes the arena and holds its descriptors, the server is its child; when the server dies, the supervisor
starts another that takes the same arena over. With the starter everything goes: no file is left in /dev/shm.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import msgspec

from cluster.members import Member
from cluster.processes import start_child
from core.errors import ConfigError, TransferError
from engine.instance import source_path
from kvcache.client import ask_figures
from kvcache.server import ArenaFds

SMALLEST_BYTES = 1 << 20
LONGEST_SOCKET = 100
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class CacheSpec(msgspec.Struct, frozen=True):
    """What `--cache` says: a size, for a server of its own with further tiers below it (`8GiB,disk=PATH:100GiB,
    redis://HOST:PORT`), or the socket of one that runs already."""

    num_bytes: int = 0
    socket: str = ""
    disk: str = ""
    disk_bytes: int = 0
    redis: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> CacheSpec:
        """Raises ConfigError with the form that is expected."""
        first, *tiers = text.split(",")
        spec = cls._parse_first(first)
        if tiers and spec.socket:
            raise ConfigError(f"--cache {text}: a server that runs already has its tiers; give its socket alone")
        for tier in tiers:
            spec = spec._with_tier(tier)
        return spec

    def _with_tier(self, text: str) -> CacheSpec:
        if text.startswith(("redis://", "rediss://", "unix://")):
            return msgspec.structs.replace(self, redis=(*self.redis, text))
        path, _, size = text.removeprefix("disk=").rpartition(":")
        if not text.startswith("disk=") or not path.startswith("/") or self.disk:
            raise ConfigError(f"--cache: {text!r} is neither disk=/FOLDER:SIZE (once) nor redis://HOST:PORT")
        return msgspec.structs.replace(self, disk=path, disk_bytes=_size(size, "a size such as 100GiB"))

    def tier_arguments(self) -> list[str]:
        """For `python -m kvcache`."""
        disk = ["--disk", self.disk, "--disk-bytes", str(self.disk_bytes)] if self.disk else []
        return [*disk, *(word for url in self.redis for word in ("--redis", url))]

    @classmethod
    def _parse_first(cls, text: str) -> CacheSpec:
        if text.startswith("unix:") or "/" in text:
            path = text.removeprefix("unix:")
            if not path.startswith("/"):
                raise ConfigError(f"--cache {text}: the socket of a cache server is an absolute path")
            return cls(socket=path)
        return cls(num_bytes=_size(text, "a size such as 8GiB, or unix:/path/of/a/cache/server"))


class CacheMember(Member):
    """A cache server of this launcher. Raises TransferError if there is no memory for its arena."""

    def __init__(self, spec: CacheSpec, folder: Path, socket: Path | None = None) -> None:
        self.socket = socket or folder / "cache.sock"
        if len(str(self.socket)) > LONGEST_SOCKET:
            raise ConfigError(f"{self.socket} is longer than a socket's path may be ({LONGEST_SOCKET} characters)")
        self._fds = fds = ArenaFds(spec.num_bytes)
        log = folder / "cache.log"
        command = [sys.executable, "-P", "-m", "kvcache", "--socket", str(self.socket)]
        command += ["--arena-fd", str(fds.arena), "--ledger-fd", str(fds.ledger)]
        command += spec.tier_arguments()
        variables = {"PYTHONPATH": source_path()}
        super().__init__("cache", log, lambda: start_child(command, variables, log, (fds.arena, fds.ledger)))

    def is_ready(self) -> bool:
        return figures_of(str(self.socket)) is not None

    def release(self) -> None:
        """Called after the server was stopped: the arena goes with the last engine that maps it."""
        self._fds.close()


def _size(text: str, wanted: str) -> int:
    """Bytes. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"--cache: {text!r} is not {wanted}")
    num_bytes = int(float(match[1]) * _UNITS[match[2].upper()])
    if num_bytes < SMALLEST_BYTES:
        raise ConfigError(f"--cache: less than 1MiB holds nothing; {text}: did you mean {match[1]}GiB?")
    return num_bytes


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
