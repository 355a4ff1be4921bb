"""Every transport by its scheme: imported when it is asked for, so that a missing library costs that scheme alone.

A transport's module offers three functions: `make(host)`, `unavailable()` (why it cannot run here, empty if it can),
`is_reachable(description)` (whether a peer's description may be connected to from here, without trying). One that has
options offers `make_with(host, options)` too.

Memory and threading: none of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, cast

from core.errors import ConfigError
from transport.base import Transport

_MODULES = {
    "shm": "transport.shm",
    "zmq": "transport.zmq_tcp",
    "nixl": "transport.nixl",
    "cuda_ipc": "transport.cuda_ipc",
    "inproc": "transport.inproc",
}
SCHEMES = tuple(_MODULES)


class _Module(Protocol):
    def make(self, host: str) -> Transport: ...

    def unavailable(self) -> str: ...

    def is_reachable(self, description: bytes) -> bool: ...


def make_transport(scheme: str, host: str, options: Mapping[str, dict[str, Any]] | None = None) -> Transport:
    """A transport by name. host: the address under which peers reach this machine, where that matters; options: by
    scheme, for those that have some. Raises ConfigError if there is none of that name, or it cannot run here."""
    for named in options or {}:
        _module(named)
    module = _module(scheme)
    why = module.unavailable()
    if why:
        raise ConfigError(f"transport {scheme!r} is not available here: {why}")
    if not options or scheme not in options:
        return module.make(host)
    make_with = getattr(module, "make_with", None)
    if make_with is None:
        raise ConfigError(f"transport_options: {scheme} has no options")
    return cast(Transport, make_with(host, options[scheme]))


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
