"""One system while it runs: an engine on one core, Baton's proxy before it, and what lies behind it.

`forget` leaves a prompt's blocks in the tier that the system is named after, and nowhere above it: Baton's engine and
cache server are started anew, LMCache's host memory is emptied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import msgspec

from benchmarks import cores
from benchmarks.backings import Backing, backing_of
from benchmarks.cache_systems import CacheSystem, Kind, Memory
from benchmarks.site import Site
from benchmarks.systems import MODEL_NAME, undisturbed
from cluster.launcher import Cluster
from cluster.options import ClusterOptions, Start
from core.errors import BatonError
from engine.instance import ServedModel


class Contestant:
    """`start` first. `forget` may change its addresses."""

    def __init__(
        self, system: CacheSystem, site: Site, memory: Memory, backing: Backing, *, prefix_caching: bool
    ) -> None:
        """prefix_caching: whether an engine with a cache behind it keeps its own prefix cache too."""
        self.system = system
        self._site = site
        self._memory = memory
        self._has_prefix_cache = system.tier == "engine" or (prefix_caching and system.kind is not Kind.NOBODY)
        self._backing = backing
        self._cluster: Cluster | None = None

    @property
    def url(self) -> str:
        """The proxy."""
        return self._running().url

    @property
    def engine_url(self) -> str:
        """The engine itself, for its metrics."""
        return self._running().instances[0].url

    def start(self) -> None:
        """Returns when it can be asked. Raises BatonError."""
        self._start_cluster()

    def settle(self) -> None:
        """Returns when all that was stored lies in its tier, as far as the system tells it."""
        self._backing.settle(self._running())

    def forget(self) -> None:
        """Afterwards only the tier itself has what was stored. Returns when the system can be asked again."""
        if self._backing.forget():
            self._running().stop()
            self._start_cluster()
            self._backing.known(self._running())

    def kill_engine(self) -> None:
        """kill -9 to the engine with all its processes; returns when another one is ready in its place."""
        self._running().restart(self._running().instances[0].name)

    def stop(self) -> None:
        """Ends everything that was started here. May be called again."""
        if self._cluster is not None:
            self._cluster.stop()

    def _running(self) -> Cluster:
        if self._cluster is None:
            raise BatonError(f"{self.system.name} does not run")
        return self._cluster

    def _start_cluster(self) -> None:
        zygote = self._site.zygote() if self.system.kind is not Kind.LMCACHE else None
        options = msgspec.structs.replace(self._options(), start=Start.FORK if zygote else Start.PLAIN)
        core, _ = cores.pair()
        with cores.only({core}):
            self._cluster = Cluster("0P1D", options, zygote=zygote)
        self._cluster.start()

    def _options(self) -> ClusterOptions:
        memory, backing = self._memory, self._backing
        more = memory.host_bytes if self.system.has_all_memory else 0
        options = self._site.recipe.options(ServedModel(str(self._site.model), MODEL_NAME, memory.engine_bytes + more))
        arguments = options.arguments_decode
        arguments += ("--enable-prefix-caching" if self._has_prefix_cache else "--no-enable-prefix-caching",)
        arguments += ("--max-model-len", str(memory.max_model_len)) if memory.max_model_len else ()
        return msgspec.structs.replace(
            options,
            arguments_decode=arguments + backing.arguments(),
            environment=backing.environment(),
            cache=backing.cache(),
        )


@contextmanager
def contestant(
    system: CacheSystem, site: Site, memory: Memory, *, prefix_caching: bool = False, backing: Backing | None = None
) -> Iterator[Contestant]:
    """A system that runs; stopped at the end, whatever ends it. backing: another one than the system's own."""
    stack = ExitStack()
    try:
        chosen = backing or stack.enter_context(backing_of(system, site, memory))
        running = Contestant(system, site, memory, chosen, prefix_caching=prefix_caching)
        stack.callback(running.stop)
        running.start()
        site.progress.done(f"{system.name} is ready")
        yield running
    finally:
        with undisturbed():
            stack.close()
