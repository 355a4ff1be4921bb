"""Makes a topology real on this machine: a proxy, instances behind it, and someone who starts again what died.

    launcher ─┬─ proxy, cache server
              ├─ zygote ─┬─ prefill-0 ── engine core      each arrow: own process group, and a tie by which the
              │          └─ decode-0  ── engine core      kernel kills the child when its parent dies
              └─ supervisor (a thread)

With a plain start the instances hang on the launcher itself. Sockets, logs and locks live in one run folder.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from cluster import plan
from cluster.cache import CacheMember, socket_of
from cluster.listing import Listing
from cluster.members import InstanceMember, Member, get, plain_starter
from cluster.options import ClusterOptions, Start
from cluster.processes import start_child
from cluster.progress import Progress
from cluster.runfolder import RunFolder
from cluster.running import Running
from cluster.supervisor import Supervisor
from cluster.zygote import Zygote
from core.errors import BatonError, ConfigError, UnsupportedError
from core.topology import Topology
from engine.build import installed_build
from engine.instance import InstanceSpec, cache_folder, source_path

_POLL_S = 0.05
_RESTART_TIMEOUT_S = 60.0


class Cluster:
    """A running topology: `with Cluster("1P1D") as cluster: ... cluster.url`.

    zygote: a preloaded process to share; it is left running. Start it from a thread that outlives this cluster.
    """

    def __init__(
        self,
        topology: Topology | str,
        options: ClusterOptions | None = None,
        progress: Progress | None = None,
        zygote: Zygote | None = None,
    ) -> None:
        self._options = plan.with_keys(options or ClusterOptions())
        self._progress = progress
        self._build = installed_build()
        self._address = plan.proxy_address(self._options)
        topology = Topology.parse(topology) if isinstance(topology, str) else topology
        self._specs = plan.instances(topology, self._options, self._address.local_url, self._build)
        self._listing = Listing(self._address.local_url)
        self._start = plan.start_of(self._options, self._build)
        self._shared_zygote = zygote
        self._running = Running()

    @property
    def url(self) -> str:
        """The OpenAI endpoint, without /v1."""
        return self._address.url

    @property
    def instances(self) -> list[InstanceMember]:
        """Prefill instances first."""
        return self._running.instances

    @property
    def members(self) -> list[Member]:
        """Everything that is supervised: the instances, the proxy and the cache server."""
        return self._running.members

    @property
    def proxy(self) -> Member:
        if self._running.proxy is None:
            raise BatonError("the cluster is not started")
        return self._running.proxy

    @property
    def cache(self) -> CacheMember:
        if self._running.cache is None:
            raise BatonError("the cluster has no cache server of its own")
        return self._running.cache

    @property
    def failed(self) -> str:
        """The names of what died too often and stays down; "" as long as all is well."""
        return self._running.failed

    def instance(self, name: str) -> InstanceMember:
        """By name: prefill-0, decode-0, decode-1, ..."""
        return next(member for member in self.instances if member.name == name)

    def __enter__(self) -> Cluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when every instance is ready. Raises BatonError with the last words of what died before."""
        running = self._running
        running.folder = RunFolder.create()
        running.proxy = self._start_proxy(running.folder)
        socket = self._start_cache(running.folder)
        zygote = self._start_zygote(running.folder)
        for spec in self._specs:
            spec = plan.with_cache(spec, socket) if socket else spec
            member = self._member(spec, running.folder, zygote)
            running.instances.append(member)
            member.start()
        self.wait_ready()
        if self._options.restart:
            running.supervisor = Supervisor(list(reversed(self.members)), self._note, self._listing.silent)
            running.supervisor.start()

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Until the proxy can use every instance. Raises BatonError at the time limit, or if one died unsupervised."""
        self._wait(lambda: self._listing.not_ready(self.instances), timeout_s or self._options.start_timeout_s)

    def restart(self, name: str) -> None:
        """Kills one instance with all its processes; returns when it is ready again."""
        member, supervised = self.instance(name), self._running.supervisor is not None
        pid = member.pid
        member.kill_group()
        if not supervised:
            member.after_death()
            member.start()
        self._wait(lambda: name if member.pid == pid else "", _RESTART_TIMEOUT_S)
        self.wait_ready()

    def stop(self) -> None:
        """Ends everything that was started; returns when no process of it lives. May be called again."""
        running, self._running = self._running, Running()
        running.stop()

    def _start_cache(self, folder: RunFolder) -> str:
        """The socket of the host's KV cache; empty if none was asked for."""
        spec = self._options.cache
        if spec is None:
            return ""
        if spec.socket:
            return socket_of(f"unix:{spec.socket}")
        cache = self._running.cache = CacheMember(spec, folder.path)
        cache.start()
        self._wait(lambda: "" if cache.is_ready() else "cache server", 30.0)
        if self._progress:
            self._progress.done(f"KV cache of {spec.num_bytes / 2**30:.3g} GiB at unix:{cache.socket}")
        return str(cache.socket)

    def _start_proxy(self, folder: RunFolder) -> Member:
        command = [sys.executable, "-P", "-m", "proxy", "--host", self._address.host, "--port", str(self._address.port)]
        command += ["--open-control"] if self._options.open_control else []
        command += ["--tenant-key", str(_tenant_key())]
        command += ["--keys", self._options.keys] if self._options.keys else []
        command += plan.contexts_arguments(self._options.cache, folder.path)
        command += self._options.proxy_arguments
        log = folder.path / "proxy.log"
        proxy = Member("proxy", log, lambda: start_child(command, {"PYTHONPATH": source_path()}, log))
        proxy.start()
        self._running.proxy = proxy
        self._wait(lambda: "" if get(f"{self._address.local_url}/health")[0] else "proxy", 60.0)
        if self._progress:
            self._progress.done(f"proxy listens on {self.url}")
        return proxy

    def _start_zygote(self, folder: RunFolder) -> Zygote | None:
        """None where instances start plainly."""
        if self._start is Start.PLAIN or self._shared_zygote:
            return self._shared_zygote if self._start is Start.FORK else None
        zygote = Zygote(folder.path, offline=Path(self._options.model.path).is_dir())
        self._running.zygote = zygote
        try:
            self._wait(lambda: "" if zygote.is_ready() else "vLLM to be imported", 300.0)
        except UnsupportedError as error:
            self._note(f"{error}: starting each instance plainly instead, which takes longer")
            return None
        if self._progress:
            self._progress.done("vLLM imported")
        return zygote

    def _member(self, spec: InstanceSpec, folder: RunFolder, zygote: Zygote | None) -> InstanceMember:
        log = folder.path / f"{spec.name}.log"
        variables = spec.variables(folder.subfolder(spec.name), cache_folder(), self._build.device)
        if zygote is None:
            return InstanceMember(spec, log, plain_starter(spec, log, variables, self._build.device))
        arguments = spec.serve_arguments(self._build.device)
        return InstanceMember(spec, log, lambda: zygote.fork(arguments, variables, log))

    def _wait(self, missing: Callable[[], str], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while text := missing():
            self._running.check_living()
            if time.monotonic() > deadline:
                raise BatonError(f"waited {timeout_s:.0f} s in vain for {text}\n{self._running.last_words()}".rstrip())
            if self._progress:
                self._progress.waiting(f"waiting for {text}")
            time.sleep(_POLL_S)

    def _note(self, text: str) -> None:
        if self._progress:
            self._progress.note(text)


def _tenant_key() -> Path:
    """Where every proxy of this user finds the secret behind its salts; makes the folder. Raises ConfigError."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make {folder}, where the tenant key lies: {error.strerror}; name another with XDG_CACHE_HOME"
        ) from error
    return folder / "tenant.key"
