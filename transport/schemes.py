"""Every transport by its scheme: imported when it is asked for, so that a missing library costs that scheme alone.

A transport's module offers three functions: `make(host)`, `unavailable()` (why it cannot run here, empty if it can),
`is_reachable(description)` (whether a peer's description may be connected to from here, without trying).

Memory and threading: none of its own.
"""

from __future__ import annotations

import importlib
from typing import Protocol, cast

from core.errors import ConfigError
from transport.base import Transport

_MODULES = {
    "shm": "transport.shm",
    "zmq": "transport.zmq_tcp",
    "cuda_ipc": "transport.cuda_ipc",
    "inproc": "transport.inproc",
}
SCHEMES = tuple(_MODULES)


class _Module(Protocol):
    def make(self, host: str) -> Transport: ...

    def unavailable(self) -> str: ...

    def is_reachable(self, description: bytes) -> bool: ...


def make_transport(scheme: str, host: str) -> Transport:
    """A transport by name. host: the address under which peers reach this machine, where that matters. Raises
    ConfigError if there is none of that name, or it cannot run here."""
    module = _module(scheme)
    why = module.unavailable()
    if why:
        raise ConfigError(f"transport {scheme!r} is not available here: {why}")
    return module.make(host)


def unavailable(scheme: str) -> str:
    """Why a scheme cannot run here; empty if it can. Raises ConfigError if there is none of that name."""
    return _module(scheme).unavailable()


def is_reachable(scheme: str, description: bytes) -> bool:
    """Whether a peer's description may be connected to from here. Raises ConfigError if there is no such scheme."""
    return _module(scheme).is_reachable(description)


def _module(scheme: str) -> _Module:
    name = _MODULES.get(scheme)
    if name is None:
        raise ConfigError(f"transport {scheme!r} is unknown; known are {', '.join(SCHEMES)}")
    return cast(_Module, importlib.import_module(name))
