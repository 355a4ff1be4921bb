"""What lies behind an engine: nothing, Baton's cache server with or without a tier below it, or LMCache's server.

    Backing        nothing                                  plain vLLM, with or without its own prefix cache
    OwnServer      arena ── disk | Redis                    started by the engine's launcher, anew with each engine
    OtherHost      arena of another host ══ TCP ══ arena    first the engine is that host's, then this one's
    OneOfTwo       arena ══ TCP ══ arena of a second host   both hosts have engines, each is the other's peer
    LMCache        lmcache server ── disk | Redis           outlives the engine

Threads: the caller's; servers are processes of their own.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.cache_systems import CacheSystem, Kind, Memory
from benchmarks.lmcache import LMCacheServer, engine_arguments, lmcache_server, variables
from benchmarks.redis_process import redis_server
from benchmarks.site import Site
from cluster.cache import CacheMember
from cluster.launcher import Cluster
from cluster.ports import LOOPBACK, check_free, free_ports
from cluster.processes import stop_groups
from core.errors import BatonError, ConfigError
from kvcache.client import ask_figures
from kvcache.spec import CacheSpec

DISK_BYTES = 16 << 30
SETTLE_TIMEOUT_S = 30.0
STILL_S = 1.0
LMCACHE_SETTLE_S = 3.0
"""It stores below its host memory in the background and does not say when it has done so."""
_POLL_S = 0.1
_TRIES = 20


class Backing:
    """Nothing; the others say what differs."""

    def cache(self) -> CacheSpec | None:
        """What the engine's launcher is told."""
        return None

    def arguments(self) -> tuple[str, ...]:
        """What the engine gets beyond everybody's arguments."""
        return ()

    def environment(self) -> dict[str, str]:
        return {}

    def settle(self, cluster: Cluster) -> None:
        """Returns when all that was stored lies in its tier, as far as it tells."""

    def forget(self) -> bool:
        """Leaves blocks in the lowest tier alone. True: that needs the engine and its launcher to be started anew."""
        return False

    def known(self, cluster: Cluster) -> None:
        """After that start: returns when the tier's blocks can be found."""


class OwnServer(Backing):
    """text: as `--cache` says it."""

    def __init__(self, text: str, *, has_tier: bool) -> None:
        self._spec = CacheSpec.parse(text)
        self._has_tier = has_tier

    def cache(self) -> CacheSpec | None:
        return self._spec

    def settle(self, cluster: Cluster) -> None:
        _until_still(str(cluster.cache.socket))

    def forget(self) -> bool:
        return self._has_tier


class OtherHost(Backing):
    """The engine's cache is first another host's server, at `socket`; then one here that has it as a peer."""

    def __init__(self, socket: str, address: str, num_bytes: int) -> None:
        self._socket = socket
        self._there = CacheSpec.parse(f"unix:{socket}")
        self._here = CacheSpec.parse(f"{num_bytes >> 20}MiB,peer={address}")
        self._is_here = False

    def cache(self) -> CacheSpec | None:
        return self._here if self._is_here else self._there

    def settle(self, cluster: Cluster) -> None:
        _until_still(self._socket)

    def forget(self) -> bool:
        self._is_here = True
        return True

    def known(self, cluster: Cluster) -> None:
        """Raises BatonError if this host never hears of the other's blocks."""
        _until_known(str(cluster.cache.socket))


class OneOfTwo(OwnServer):
    """here, there: HOST:PORT where this host's and the other one's cache server listen to peers."""

    def __init__(self, num_bytes: int, here: str, there: str) -> None:
        super().__init__(f"{num_bytes >> 20}MiB,listen={here},peer={there}", has_tier=True)

    def settle(self, cluster: Cluster) -> None:
        """Also until it knows of the other's blocks. Raises BatonError if it never hears of them."""
        _until_known(str(cluster.cache.socket))


class LMCache(Backing):
    """Its server, and its packages' folder."""

    def __init__(self, server: LMCacheServer, folder: Path, *, has_tier: bool) -> None:
        self._server = server
        self._folder = folder
        self._has_tier = has_tier

    def arguments(self) -> tuple[str, ...]:
        return engine_arguments(self._server)

    def environment(self) -> dict[str, str]:
        return variables(self._folder)

    def settle(self, cluster: Cluster) -> None:
        time.sleep(LMCACHE_SETTLE_S)

    def forget(self) -> bool:
        if self._has_tier:
            self._server.clear()
        return False


@contextmanager
def backing_of(system: CacheSystem, site: Site, memory: Memory) -> Iterator[Backing]:
    """With the servers that it needs, which are stopped at the end. Raises BatonError if one does not come up."""
    size = f"{memory.host_bytes >> 20}MiB"
    match system.kind, system.tier:
        case Kind.NOBODY, _:
            yield Backing()
        case Kind.BATON, "peer":
            with _other_host(site.folder.subfolder("other-host"), size) as (socket, address):
                yield OtherHost(socket, address, memory.host_bytes)
        case Kind.BATON, "disk":
            folder = tempfile.mkdtemp(prefix="baton-", dir=site.disk)
            yield OwnServer(f"{size},disk={folder}:{DISK_BYTES >> 20}MiB", has_tier=True)
        case Kind.BATON, "redis":
            with redis_server(site.folder.path) as port:
                yield OwnServer(f"{size},redis://{LOOPBACK}:{port}/0", has_tier=True)
        case Kind.BATON, _:
            yield OwnServer(size, has_tier=False)
        case Kind.LMCACHE, _:
            with _lmcache(system, site, memory) as backing:
                yield backing


@contextmanager
def _lmcache(system: CacheSystem, site: Site, memory: Memory) -> Iterator[LMCache]:
    if site.lmcache is None:
        raise BatonError("LMCache needs --lmcache FOLDER")
    folder = site.folder.path
    with (
        _adapter(system, site) as adapter,
        lmcache_server(site.lmcache, folder, memory.host_bytes, adapter) as server,
    ):
        yield LMCache(server, site.lmcache, has_tier=bool(adapter))


@contextmanager
def _adapter(system: CacheSystem, site: Site) -> Iterator[dict[str, object]]:
    """What LMCache's server has below its host memory, in its words."""
    match system.tier:
        case "disk":
            yield {"type": "fs", "base_path": tempfile.mkdtemp(prefix="lmcache-", dir=site.disk)}
        case "redis":
            with redis_server(site.folder.path) as port:
                yield {"type": "resp", "host": LOOPBACK, "port": port}
        case _:
            yield {}


@contextmanager
def _other_host(folder: Path, size: str) -> Iterator[tuple[str, str]]:
    """A cache server that stands for another host's: its socket, and the address where peers ask it."""
    address = f"{LOOPBACK}:{two_free_ports(LOOPBACK)}"
    member = CacheMember(CacheSpec.parse(f"{size},listen={address}"), folder)
    member.start()
    try:
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while not member.is_ready():
            if member.exit_code() is not None or time.monotonic() > deadline:
                raise BatonError(f"the other host's cache server did not start\n{member.last_words()}")
            time.sleep(_POLL_S)
        yield str(member.socket), address
    finally:
        if member.child:
            stop_groups([member.child])
        member.release()


def two_free_ports(host: str) -> int:
    """The first of two neighbours: a cache server listens at both. Raises BatonError."""
    for _ in range(_TRIES):
        (port,) = free_ports(1, host)
        with suppress(ConfigError):
            check_free(port + 1, host)
            return port
    raise BatonError("no two neighbouring ports are free")


def _until_known(socket: str) -> None:
    """Until a cache server has all of its peer's blocks in its directory."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while not ask_figures(socket).get("peer_blocks"):
        if time.monotonic() > deadline:
            raise BatonError("the peer's blocks did not become known")
        time.sleep(_POLL_S)
    _until_still(socket)


def _until_still(socket: str) -> None:
    """Until nothing is reserved and a cache server's figures have not changed for a while."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    still_s, last = time.monotonic(), ask_figures(socket)
    while time.monotonic() < deadline:
        time.sleep(_POLL_S)
        figures = ask_figures(socket)
        if figures != last or figures["reserved_bytes"]:
            still_s, last = time.monotonic(), figures
        elif time.monotonic() - still_s > STILL_S:
            return
