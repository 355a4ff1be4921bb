"""The systems that are compared, all running at once, forked from one preloaded process; one at a time is asked.

launcher ─┬─ zygote ── plain: 1 vLLM   shm: prefill + decode   zmq: prefill + decode
          └─ a proxy per system: the same path for every request
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import msgspec

from benchmarks import cores
from benchmarks.shapes import Shape, write_model
from cluster.bundled import BUNDLED_FOLDER
from cluster.launcher import Cluster
from cluster.options import ClusterOptions, Start
from cluster.progress import Progress
from cluster.runfolder import RunFolder
from cluster.zygote import Zygote
from core.errors import BatonError, UnsupportedError
from engine.build import Device, installed_build
from engine.instance import ServedModel

MODEL_NAME = "bench"
KV_CACHE_BYTES = 512 << 20
ELEMENT_BYTES = {"bfloat16": 2, "float32": 4}
MAX_MODEL_LEN = 4608
MAX_NUM_BATCHED_TOKENS = 2048
"""What vLLM 0.32 takes for a CPU server if it is not told, and says so only in the first log of a process."""
MAX_TOKENS = 6
MIN_PROMPT_TOKENS = 129
"""What is shorter than a block of 128 and one token is not handed off."""
MAX_PROMPT_TOKENS = MAX_MODEL_LEN - MAX_TOKENS
IMPORT_TIMEOUT_S = 300.0

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class System(msgspec.Struct, frozen=True):
    """One competitor. transport: empty for plain vLLM."""

    name: str
    topology: str
    transport: str = ""


SYSTEMS = {
    system.name: system
    for system in (System("plain", "0P1D"), System("shm", "1P1D", "shm"), System("zmq", "1P1D", "zmq"))
}


class Recipe(msgspec.Struct, frozen=True):
    """What every instance is started with."""

    shape: Shape
    dtype: str
    max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS
    kv_cache_bytes: int = KV_CACHE_BYTES

    @property
    def token_bytes(self) -> int:
        """Of KV, over all layers."""
        return self.shape.token_bytes(ELEMENT_BYTES[self.dtype])

    def options(self, model: ServedModel) -> ClusterOptions:
        """The same for prefill, decode and plain instances. Nothing that dies is started again."""
        arguments = ["--load-format", "dummy", "--dtype", self.dtype, "--seed", "0"]
        arguments += ["--max-model-len", str(MAX_MODEL_LEN)]
        arguments += ["--max-num-batched-tokens", str(self.max_num_batched_tokens)]
        both = tuple(arguments)
        return ClusterOptions(model=model, arguments_prefill=both, arguments_decode=both, restart=False)


@contextmanager
def running(
    systems: tuple[System, ...], recipe: Recipe, progress: Progress, zygote: Zygote | None = None
) -> Iterator[dict[str, Cluster]]:
    """Started systems by name. Everything is stopped at the end, whatever ends it; a given zygote is left running."""
    if installed_build().device is not Device.CPU:
        raise UnsupportedError("baton bench handoff measures CPU instances: hand-off on a GPU is not supported yet")
    stack = ExitStack()
    try:
        folder = RunFolder.create()
        stack.callback(folder.remove)
        path = write_model(recipe.shape, folder.subfolder("model"), BUNDLED_FOLDER)
        options = recipe.options(ServedModel(str(path), MODEL_NAME, recipe.kv_cache_bytes))
        zygote = zygote or preloaded(folder, stack, progress)
        clusters: dict[str, Cluster] = {}
        stack.callback(_stop, clusters)
        for system in systems:
            clusters[system.name] = cluster = _planned(system, options, zygote, progress)
            cluster.start()
            progress.done(f"{system.name} ({system.topology}) is ready")
        yield clusters
    finally:
        with undisturbed():
            stack.close()


def cores_of(clusters: Mapping[str, Cluster]) -> dict[str, tuple[int, ...]]:
    """Which cores each engine is bound to, by system/instance."""
    return {
        f"{name}/{member.name}": member.spec.cores for name, cluster in clusters.items() for member in cluster.instances
    }


def _planned(system: System, options: ClusterOptions, zygote: Zygote | None, progress: Progress) -> Cluster:
    """A cluster that is bound to one core per instance."""
    replaced = msgspec.structs.replace(
        options, transport=system.transport or "auto", start=Start.FORK if zygote else Start.PLAIN
    )
    prefill, decode = cores.pair()
    with cores.only({prefill, decode} if system.transport else {prefill}):
        return Cluster(system.topology, replaced, progress, zygote)


def _stop(clusters: Mapping[str, Cluster]) -> None:
    """All at once: each takes seconds to leave."""
    with ThreadPoolExecutor(max(len(clusters), 1)) as pool:
        for stopping in [pool.submit(cluster.stop) for cluster in clusters.values()]:
            stopping.result()


def preloaded(folder: RunFolder, stack: ExitStack, progress: Progress) -> Zygote | None:
    """None where this vLLM cannot be forked: then each instance starts plainly, which takes longer."""
    zygote = Zygote(folder.path)
    stack.callback(zygote.close)
    deadline = time.monotonic() + IMPORT_TIMEOUT_S
    try:
        while not zygote.is_ready():
            if time.monotonic() > deadline:
                raise BatonError(f"vLLM was not imported within {IMPORT_TIMEOUT_S:.0f} s")
            progress.waiting("waiting for vLLM to be imported")
            time.sleep(0.05)
    except UnsupportedError as error:
        progress.note(f"{error}: starting each instance plainly instead")
        return None
    progress.done("vLLM imported")
    return zygote


@contextmanager
def undisturbed() -> Iterator[None]:
    """A second Ctrl-C does not break the clean-up off."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
