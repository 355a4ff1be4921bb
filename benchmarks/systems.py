"""The systems that are compared, all running at once, forked from one preloaded process; one at a time is asked.

launcher ─┬─ zygote ── plain: 1 vLLM   shm: prefill + decode   zmq: prefill + decode
          └─ a proxy per system: the same path for every request
"""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Iterator
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
MAX_MODEL_LEN = 4608
MAX_TOKENS = 6
MIN_PROMPT_TOKENS = 129
"""What is shorter than a block of 128 and one token is not handed off."""
MAX_PROMPT_TOKENS = MAX_MODEL_LEN - MAX_TOKENS
IMPORT_TIMEOUT_S = 300.0

_BATCHED = re.compile(r"Chunked prefill is enabled with max_num_batched_tokens=(\d+)")
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


class Setting(msgspec.Struct, frozen=True):
    """What every system was started with, as it really is. cores: by instance; batched: by instance, 0: not said."""

    arguments: tuple[str, ...]
    kv_cache_bytes: int
    core_prefill: int
    core_decode: int
    cores: dict[str, tuple[int, ...]]
    batched: dict[str, int]


@contextmanager
def running(
    systems: tuple[System, ...], shape: Shape, max_num_batched_tokens: int | None, progress: Progress
) -> Iterator[dict[str, Cluster]]:
    """Started systems by name. Everything is stopped at the end, whatever ends it."""
    if installed_build().device is not Device.CPU:
        raise UnsupportedError("baton bench handoff measures CPU instances: hand-off on a GPU is not supported yet")
    stack = ExitStack()
    try:
        folder = RunFolder.create()
        stack.callback(folder.remove)
        path = write_model(shape, folder.subfolder("model"), BUNDLED_FOLDER)
        options = _options(ServedModel(str(path), MODEL_NAME, KV_CACHE_BYTES), max_num_batched_tokens)
        zygote = _zygote(folder, stack, progress)
        clusters = {}
        for system in systems:
            clusters[system.name] = cluster = _planned(system, options, zygote, progress)
            stack.callback(cluster.stop)
            cluster.start()
            progress.done(f"{system.name} ({system.topology}) is ready")
        yield clusters
    finally:
        with _undisturbed():
            stack.close()


def setting_of(clusters: dict[str, Cluster]) -> Setting:
    """Read from the running instances, not from what was asked for."""
    members = {f"{name}/{member.name}": member for name, cluster in clusters.items() for member in cluster.instances}
    batched = {}
    for name, member in members.items():
        said = _BATCHED.search(member.log.read_text(errors="replace"))
        batched[name] = int(said[1]) if said else 0
    core_prefill, core_decode = cores.pair()
    return Setting(
        arguments=next(iter(members.values())).spec.arguments,
        kv_cache_bytes=KV_CACHE_BYTES,
        core_prefill=core_prefill,
        core_decode=core_decode,
        cores={name: member.spec.cores for name, member in members.items()},
        batched=batched,
    )


def _options(model: ServedModel, max_num_batched_tokens: int | None) -> ClusterOptions:
    arguments = ["--load-format", "dummy", "--dtype", "bfloat16", "--seed", "0", "--max-model-len", str(MAX_MODEL_LEN)]
    if max_num_batched_tokens is not None:
        arguments += ["--max-num-batched-tokens", str(max_num_batched_tokens)]
    both = tuple(arguments)
    return ClusterOptions(model=model, arguments_prefill=both, arguments_decode=both, restart=False)


def _planned(system: System, options: ClusterOptions, zygote: Zygote | None, progress: Progress) -> Cluster:
    """A cluster that is bound to one core per instance."""
    replaced = msgspec.structs.replace(
        options, transport=system.transport or "auto", start=Start.FORK if zygote else Start.PLAIN
    )
    prefill, decode = cores.pair()
    with cores.only({prefill, decode} if system.transport else {prefill}):
        return Cluster(system.topology, replaced, progress, zygote)


def _zygote(folder: RunFolder, stack: ExitStack, progress: Progress) -> Zygote | None:
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
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C does not break the clean-up off."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def progress_on_stderr() -> Progress:
    return Progress(sys.stderr)
