"""vLLM's general plugin of Baton: vLLM calls `register` in every process that it starts.

What must happen inside the process: on a CPU the permission for AMX tiles (without it a bf16 engine can die of SIGILL
on its first request) and seeds that cannot end an engine (engine/patches.py); and, where Baton's launcher asks for it,
the tie to the parent: vLLM's engine core and workers would otherwise outlive a killed API server.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import re
from collections.abc import Mapping

from engine.instance import ENV_DIE_WITH_PARENT, ENV_ENGINE_CORES
from engine.patches import keep_seeds_on_cpu
from transport.parent import die_with_parent

_RANK_CORES = {
    "KMP_AFFINITY": r"proclist=\[([\d,]+)\]",
    "GOMP_CPU_AFFINITY": r"^([\d ]+)$",
    "OMP_PLACES": r"^\{([\d,]+)\}$",
}

_log = logging.getLogger(__name__)


def register() -> None:
    """Called by vLLM; never raises, because that would end the engine."""
    try:
        allow_amx()
        parent = multiprocessing.parent_process()
        if parent is not None and is_on_cpu():
            keep_seeds_on_cpu()
        if parent is not None and parent.pid is not None and os.environ.get(ENV_DIE_WITH_PARENT) == "1":
            die_with_parent(parent.pid)
            bind_engine(os.environ)
    except Exception:  # noqa: BLE001 - an engine without these precautions is better than none
        _log.exception("baton's plugin could not do its work")


def allow_amx() -> None:
    """Asks Linux for the AMX tiles; forked processes inherit the permission. Nothing to do on other processors."""
    import torch

    init = getattr(torch.cpu, "_init_amx", None)
    if init is not None:
        init()


def is_on_cpu() -> bool:
    """Whether vLLM computes on the CPU here."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def bind_engine(environment: Mapping[str, str]) -> None:
    """Keeps the engine's threads, but not the API server's, on the cores that the launcher gave it."""
    cores = engine_cores(environment)
    if cores:
        with contextlib.suppress(OSError):  # a core that was taken away meanwhile: run where the system allows
            os.sched_setaffinity(0, cores)


def engine_cores(environment: Mapping[str, str]) -> set[int]:
    """The cores of this process: of a tensor-parallel rank its share, of the engine's core all. Empty: not bound.

    vLLM tells a rank its share by the variable of whichever OpenMP library it found (`OMPProcessManager`).
    """
    given = {int(core) for core in environment.get(ENV_ENGINE_CORES, "").split(",") if core}
    for name, pattern in _RANK_CORES.items():
        listed = re.search(pattern, environment.get(name, ""))
        share = {int(core) for core in re.findall(r"\d+", listed[1])} if listed else set()
        if share and share < given:
            return share
    return given
