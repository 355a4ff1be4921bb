"""The systems that `baton bench cache` compares, and one of them running: always one engine behind Baton's own proxy.

    plain, prefix            proxy ── vLLM                            its own prefix cache off, on
    host, disk, redis, peer  proxy ── vLLM + Baton ── cache server ── disk | Redis | another cache server
    lmcache, ...-disk, ...   proxy ── vLLM + LMCacheMPConnector ── lmcache server ── disk | Redis

One system runs at a time, its engine on the same single core. `forget` leaves a prompt's blocks in the tier that the
system is named after, and nowhere above it: Baton's engine and cache server are started anew, LMCache's host memory is
emptied.
"""

from __future__ import annotations

import enum
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import msgspec

from benchmarks import cores
from benchmarks.lmcache import LMCacheServer, engine_arguments, lmcache_server, variables
from benchmarks.redis_process import redis_server
from benchmarks.shapes import write_model
from benchmarks.systems import MODEL_NAME, Recipe, preloaded, undisturbed
from cluster.bundled import BUNDLED_FOLDER
from cluster.cache import CacheMember
from cluster.launcher import Cluster
from cluster.options import ClusterOptions, Start
from cluster.ports import LOOPBACK, check_free, free_ports
from cluster.processes import stop_groups
from cluster.progress import Progress
from cluster.runfolder import RunFolder
from cluster.zygote import Zygote
from core.errors import BatonError, ConfigError
from engine.instance import ServedModel
from kvcache.client import ask_figures
from kvcache.spec import CacheSpec

DISK_BYTES = 16 << 30
SETTLE_TIMEOUT_S = 30.0
STILL_S = 1.0
LMCACHE_SETTLE_S = 3.0
"""It stores below its host memory in the background and does not say when it has done so."""
_POLL_S = 0.1
_TRIES = 20


class Kind(enum.Enum):
    """Who keeps the blocks beyond the engine's own cache."""

    NOBODY = "nobody"
    BATON = "baton"
    LMCACHE = "lmcache"


class CacheSystem(msgspec.Struct, frozen=True):
    """One competitor. tier: where it finds what its engine has forgotten. has_all_memory: its engine's own cache gets
    the host memory of the others on top. has_workloads: whether workloads are worth their time with it."""

    name: str
    kind: Kind
    tier: str = ""
    has_all_memory: bool = False
    has_workloads: bool = True

    @property
    def is_below_host(self) -> bool:
        """Whether something lies above its tier that has to forget first."""
        return self.tier in ("disk", "redis", "peer")


SYSTEMS = {
    system.name: system
    for system in (
        CacheSystem("plain", Kind.NOBODY),
        CacheSystem("prefix", Kind.NOBODY, "engine"),
        CacheSystem("prefix-large", Kind.NOBODY, "engine", has_all_memory=True),
        CacheSystem("host", Kind.BATON, "host"),
        CacheSystem("disk", Kind.BATON, "disk"),
        CacheSystem("redis", Kind.BATON, "redis"),
        CacheSystem("peer", Kind.BATON, "peer", has_workloads=False),
        CacheSystem("lmcache", Kind.LMCACHE, "host"),
        CacheSystem("lmcache-disk", Kind.LMCACHE, "disk", has_workloads=False),
        CacheSystem("lmcache-redis", Kind.LMCACHE, "redis", has_workloads=False),
    )
}


class Memory(msgspec.Struct, frozen=True):
    """engine_bytes: of every engine's KV cache. host_bytes: of every arena and of LMCache's host memory. max_model_len:
    of every engine; 0 leaves it as the recipe has it."""

    engine_bytes: int
    host_bytes: int
    max_model_len: int = 0


class Site:
    """What all systems share: the model, the preloaded process, folders, the core.

    Everything that was started is stopped with it. disk: where tiers on disk keep their blocks.
    """

    def __init__(self, recipe: Recipe, progress: Progress, lmcache: Path | None, zygote: Zygote | None) -> None:
        """zygote: shared with somebody else, and left running."""
        self.recipe = recipe
        self.progress = progress
        self.lmcache = lmcache
        self._stack = ExitStack()
        self.folder = RunFolder.create()
        self._stack.callback(self.folder.remove)
        self.disk = Path(tempfile.mkdtemp(prefix="baton-bench-", dir=tempfile.gettempdir()))
        self._stack.callback(shutil.rmtree, self.disk, ignore_errors=True)
        self.model = write_model(recipe.shape, self.folder.subfolder("model"), BUNDLED_FOLDER)
        self._zygote = zygote

    def zygote(self) -> Zygote | None:
        """One preloaded process for all of Baton's engines and the plain ones."""
        if self._zygote is None:
            self._zygote = preloaded(self.folder, self._stack, self.progress)
        return self._zygote

    def close(self) -> None:
        """Stops and removes everything, undisturbed by a second Ctrl-C."""
        with undisturbed():
            self._stack.close()


class Contestant:
    """One system while it runs. `forget` may change its addresses."""

    def __init__(self, system: CacheSystem, site: Site, memory: Memory, *, prefix_caching: bool) -> None:
        """prefix_caching: whether an engine with a cache behind it keeps its own prefix cache too."""
        self.system = system
        self._site = site
        self._memory = memory
        self._has_prefix_cache = system.tier == "engine" or (prefix_caching and system.kind is not Kind.NOBODY)
        self._stack = ExitStack()
        self._cluster_stack = ExitStack()
        self._words = ""
        self._lmcache: LMCacheServer | None = None
        self._holder: OtherHost | None = None
        self.cluster: Cluster | None = None

    @property
    def url(self) -> str:
        """The proxy."""
        return self._running().url

    @property
    def engine_url(self) -> str:
        """The engine itself, for its metrics."""
        return self._running().instances[0].url

    @property
    def cores(self) -> tuple[int, ...]:
        return self._running().instances[0].spec.cores

    def start(self) -> None:
        """Returns when it can be asked. Raises BatonError."""
        if self.system.kind is Kind.LMCACHE:
            self._lmcache = self._stack.enter_context(self._lmcache_server())
        elif self.system.tier == "peer":
            folder = self._site.folder.subfolder("other-host")
            self._holder = self._stack.enter_context(other_host(folder, self._memory.host_bytes))
            self._words = f"unix:{self._holder.socket}"
        elif self.system.kind is Kind.BATON:
            self._words = self._size() + self._tier_words()
        self._start_cluster()

    def forget(self) -> None:
        """Afterwards only the tier itself has what was stored. Returns when the system can be asked again."""
        if not self.system.is_below_host:
            return
        if self._lmcache is not None:
            self._lmcache.clear()
            return
        self._cluster_stack.close()
        if self._holder is not None:
            self._words = f"{self._size()},peer={self._holder.address}"
        self._start_cluster()
        if self._holder is not None:
            _until_known(str(self._running().cache.socket))

    def settle(self) -> None:
        """Returns when all that was stored lies in its tier, as far as the system tells it."""
        if self._lmcache is not None:
            time.sleep(LMCACHE_SETTLE_S)
        elif self.system.kind is Kind.BATON:
            _until_still(self._holder.socket if self._holder else str(self._running().cache.socket))

    def kill_engine(self) -> None:
        """kill -9 to the engine with all its processes; returns when another one is ready in its place."""
        self._running().restart(self._running().instances[0].name)

    def stop(self) -> None:
        """Ends everything that was started here. May be called again."""
        self._cluster_stack.close()
        self._stack.close()

    def _running(self) -> Cluster:
        if self.cluster is None:
            raise BatonError(f"{self.system.name} does not run")
        return self.cluster

    def _start_cluster(self) -> None:
        site, is_lmcache = self._site, self._lmcache is not None
        zygote = None if is_lmcache else site.zygote()
        options = msgspec.structs.replace(
            self._options(), start=Start.FORK if zygote else Start.PLAIN, cache=self._cache_spec()
        )
        core, _ = cores.pair()
        with cores.only({core}):
            self.cluster = Cluster("0P1D", options, zygote=zygote)
        self._cluster_stack.enter_context(self.cluster)

    def _options(self) -> ClusterOptions:
        more = self._memory.host_bytes if self.system.has_all_memory else 0
        model = ServedModel(str(self._site.model), MODEL_NAME, self._memory.engine_bytes + more)
        options = self._site.recipe.options(model)
        arguments = options.arguments_decode
        arguments += ("--enable-prefix-caching" if self._has_prefix_cache else "--no-enable-prefix-caching",)
        if self._memory.max_model_len:
            arguments += ("--max-model-len", str(self._memory.max_model_len))
        if self._lmcache is None or self._site.lmcache is None:
            return msgspec.structs.replace(options, arguments_decode=arguments)
        return msgspec.structs.replace(
            options,
            arguments_decode=arguments + engine_arguments(self._lmcache),
            environment=variables(self._site.lmcache),
        )

    def _cache_spec(self) -> CacheSpec | None:
        if self.system.kind is not Kind.BATON:
            return None
        return CacheSpec.parse(self._words)

    def _size(self) -> str:
        return f"{self._memory.host_bytes >> 20}MiB"

    def _tier_words(self) -> str:
        """What `--cache` says behind the size."""
        match self.system.tier:
            case "disk":
                folder = tempfile.mkdtemp(prefix="baton-", dir=self._site.disk)
                return f",disk={folder}:{DISK_BYTES >> 20}MiB"
            case "redis":
                port = self._stack.enter_context(redis_server(self._site.folder.path))
                return f",redis://{LOOPBACK}:{port}/0"
            case _:
                return ""

    @contextmanager
    def _lmcache_server(self) -> Iterator[LMCacheServer]:
        if self._site.lmcache is None:
            raise BatonError("LMCache needs --lmcache FOLDER")
        adapter: dict[str, object] = {}
        if self.system.tier == "disk":
            adapter = {"type": "fs", "base_path": tempfile.mkdtemp(prefix="lmcache-", dir=self._site.disk)}
        elif self.system.tier == "redis":
            port = self._stack.enter_context(redis_server(self._site.folder.path))
            adapter = {"type": "resp", "host": LOOPBACK, "port": port}
        folder = self._site.folder.path
        with lmcache_server(self._site.lmcache, folder, self._memory.host_bytes, adapter) as server:
            yield server


class OtherHost(msgspec.Struct, frozen=True):
    """A cache server that stands for another host's: its engines reach it by the socket, peers by the address."""

    socket: str
    address: str


@contextmanager
def other_host(folder: Path, num_bytes: int) -> Iterator[OtherHost]:
    """Serves until the block's end. Raises BatonError if it does not come up."""
    address = f"{LOOPBACK}:{_two_free_ports()}"
    member = CacheMember(CacheSpec.parse(f"{num_bytes >> 20}MiB,listen={address}"), folder)
    member.start()
    try:
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while not member.is_ready():
            if member.exit_code() is not None or time.monotonic() > deadline:
                raise BatonError(f"the other host's cache server did not start\n{member.last_words()}")
            time.sleep(_POLL_S)
        yield OtherHost(str(member.socket), address)
    finally:
        if member.child:
            stop_groups([member.child])
        member.release()


def _two_free_ports() -> int:
    """The first of two neighbours: a cache server listens at both. Raises BatonError."""
    for _ in range(_TRIES):
        (port,) = free_ports(1, LOOPBACK)
        with suppress(ConfigError):
            check_free(port + 1, LOOPBACK)
            return port
    raise BatonError("no two neighbouring ports are free")


def _until_known(socket: str) -> None:
    """Until a cache server has heard what its peer holds. Raises BatonError if it never does."""
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


@contextmanager
def contestant(
    system: CacheSystem, site: Site, memory: Memory, *, prefix_caching: bool = False
) -> Iterator[Contestant]:
    """A system that runs; stopped at the end, whatever ends it."""
    running = Contestant(system, site, memory, prefix_caching=prefix_caching)
    try:
        running.start()
        site.progress.done(f"{system.name} is ready")
        yield running
    finally:
        with undisturbed():
            running.stop()


@contextmanager
def site_of(recipe: Recipe, progress: Progress, lmcache: Path | None, zygote: Zygote | None = None) -> Iterator[Site]:
    """The ground of one run."""
    with closing(Site(recipe, progress, lmcache, zygote)) as site:
        yield site
