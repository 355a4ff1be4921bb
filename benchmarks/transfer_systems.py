"""Who is compared by `baton bench transfer`: memcpy, every transport of Baton's registry, and peers that are here.

A transport is known to transport/schemes.py and to nobody else: one that is added there is measured here. What cannot
run here is kept with its reason, for the table.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Protocol, cast

import msgspec

from benchmarks import mover_memcpy, mover_mooncake, mover_nixl, mover_pyzmq, mover_tcp, mover_ucxx
from benchmarks.mover import Ground, Receiver, Sender
from core.errors import ConfigError
from engine.instance import source_path
from transport.schemes import SCHEMES, unavailable

MEMCPY = "memcpy"
_ONE_PROCESS = ("inproc",)
"""Schemes that do not leave the process."""
_ELSEWHERE = {"cuda_ipc": "its blocks are GPU memory, which is measured by: python -m benchmarks.cuda_ipc"}
"""Schemes that cannot be set against copies of host memory."""


class System(msgspec.Struct, frozen=True):
    """One competitor. is_baton: one of Baton's transports, under its scheme. why_not: why it cannot run, if so."""

    name: str
    is_baton: bool = False
    why_not: str = ""
    environment: dict[str, str] = {}


class _Module(Protocol):
    def sender(self, ground: Ground) -> Sender: ...

    def receiver(self, ground: Ground) -> Receiver: ...


_MODULES = {
    MEMCPY: mover_memcpy,
    "nixl-raw": mover_nixl,
    "nixl-tuned": mover_nixl,
    "ucxx-raw": mover_ucxx,
    "pyzmq-raw": mover_pyzmq,
    "tcp-raw": mover_tcp,
    "mooncake": mover_mooncake,
}


def systems(mooncake: Path | None) -> list[System]:
    """All of them, memcpy first, then Baton's, those that cannot run here too."""
    schemes = [scheme for scheme in SCHEMES if scheme not in _ONE_PROCESS]
    own = [System(scheme, True, unavailable(scheme) or _ELSEWHERE.get(scheme, "")) for scheme in schemes]
    peers = [
        System("nixl-raw", why_not=mover_nixl.unavailable()),
        System(mover_nixl.TUNED, why_not=mover_nixl.unavailable(), environment=mover_nixl.TUNED_ENVIRONMENT),
        System("ucxx-raw", why_not=mover_ucxx.unavailable()),
        System("pyzmq-raw"),
        System("tcp-raw"),
    ]
    if mooncake is None:
        peers.append(
            System("mooncake", why_not="not asked for: --mooncake FOLDER, made by scripts/mooncake_env FOLDER")
        )
    else:
        peers.append(System("mooncake", environment=mover_mooncake.variables(mooncake)))
    return [System(MEMCPY), *own, *peers]


def chosen(text: str | None, mooncake: Path | None) -> tuple[System, ...]:
    """By name, with commas; all if none is named. memcpy is always there: everything is compared with it. Raises
    ConfigError for a name that is not known, or that was named and cannot run."""
    known = {system.name: system for system in systems(mooncake)}
    if not text:
        return tuple(known.values())
    names = list(dict.fromkeys([MEMCPY, *(part.strip() for part in text.split(","))]))
    for name in names:
        if name not in known:
            raise ConfigError(f"--systems: unknown system {name!r}; known: {', '.join(known)}")
        if known[name].why_not:
            raise ConfigError(f"--systems: {name} cannot run here: {known[name].why_not}")
    return tuple(known[name] for name in names)


def environment_of(system: System) -> dict[str, str]:
    """Of its processes."""
    return {**os.environ, "PYTHONPATH": source_path(), **system.environment}


def module_of(name: str) -> _Module | None:
    """What makes its senders and receivers; None for Baton's transports."""
    module = _MODULES.get(name)
    return cast(_Module, importlib.import_module(module.__name__)) if module is not None else None
