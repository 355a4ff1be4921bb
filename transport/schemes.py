"""Every transport by its scheme: imported when it is asked for, so that a missing library costs that scheme alone.

A transport's module offers three functions: `make(host)`, `unavailable()` (why it cannot run here, empty if it can),
`is_reachable(description)` (whether a peer's description may be connected to from here, without trying). One whose
bytes travel over a network also has `make_encrypted(host, keys)`, or is refused where the cluster has keys; one that
has options also has `make_with(host, options)`. One with `MEASURED = False` has no results file from the hardware it is
for: it is taken when pinned by hand, never by itself.

Memory and threading: none of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from core.errors import ConfigError
from transport.base import Transport
from transport.keys import Keys

_MODULES = {
    "shm": "transport.shm",
    "zmq": "transport.zmq_tcp",
    "ucx": "transport.ucx",
    "nixl": "transport.nixl",
    "cuda_ipc": "transport.cuda_ipc",
    "inproc": "transport.inproc",
}
SCHEMES = tuple(_MODULES)
OFF_THE_WIRE = frozenset({"shm", "cuda_ipc", "inproc"})
"""Nothing of these leaves the host's memory, so there is nothing to encrypt."""

_FOR_FAST_HARDWARE = frozenset({"nixl", "ucx"})
"""On one host of CPUs they lose to shm and cost every engine their libraries' memory and start-up: `auto` takes them
where there is an RDMA device or a GPU."""

_WITHIN_ONE_PROCESS = frozenset({"inproc"})


def choices() -> list[str]:
    """What `--transport` takes."""
    return ["auto", *(scheme for scheme in SCHEMES if scheme not in _WITHIN_ONE_PROCESS)]


def wanted_schemes(transport: str, *, has_keys: bool = False) -> list[str]:
    """The schemes that an instance offers, best first: `auto` or the one that was pinned. has_keys: see `unavailable`.

    Raises ConfigError, with the reason, if that one is unknown or cannot run here.
    """
    if transport != "auto":
        why = unavailable(transport, has_keys=has_keys)
        if why:
            raise ConfigError(
                f"--transport {transport} cannot run here: {why}; `baton doctor` shows what can, and auto takes it"
            )
        return [transport]
    return [scheme for scheme in choices()[1:] if not why_not_auto(scheme, has_keys=has_keys)]


def why_not_auto(scheme: str, *, has_keys: bool = False) -> str:
    """Why `auto` does not offer a scheme; empty if it does."""
    if not is_measured(scheme):
        return "never measured on its hardware: only when pinned by --transport"
    if scheme in _FOR_FAST_HARDWARE and not has_fast_hardware():
        return "no RDMA device and no GPU here: only when pinned by --transport"
    if scheme == "ucx" and not unavailable("nixl", has_keys=has_keys):
        return "NIXL is here and brings a UCX of its own; two in one process have crashed: only when pinned"
    return unavailable(scheme, has_keys=has_keys)


def is_measured(scheme: str) -> bool:
    """Whether it may be taken without being pinned. Raises ConfigError if there is no such scheme."""
    return bool(getattr(_module(scheme), "MEASURED", True))


def has_fast_hardware(root: Path = Path("/")) -> bool:
    """Whether there is an RDMA device or an NVIDIA GPU."""
    return any((root / "sys/class/infiniband").glob("*")) or any((root / "dev").glob("nvidia[0-9]*"))


class _Module(Protocol):
    def make(self, host: str) -> Transport: ...

    def unavailable(self) -> str: ...

    def is_reachable(self, description: bytes) -> bool: ...


def make_transport(
    scheme: str, host: str, keys: Keys | None = None, options: Mapping[str, dict[str, Any]] | None = None
) -> Transport:
    """A transport by name. host: the address under which peers reach this machine, where that matters. keys: what
    leaves this host is encrypted. options: by scheme, for those that have some. Raises ConfigError if there is none of
    that name, or it cannot run here."""
    for named in options or {}:
        _module(named)
    module = _module(scheme)
    why = unavailable(scheme, has_keys=keys is not None)
    if why:
        raise ConfigError(f"transport {scheme!r} is not available here: {why}")
    if options and scheme in options:
        return _make_with(module, scheme, host, options[scheme])
    if keys is None or scheme in OFF_THE_WIRE:
        return module.make(host)
    made: Transport = module.make_encrypted(host, keys)  # type: ignore[attr-defined]
    return made


def unavailable(scheme: str, *, has_keys: bool = False) -> str:
    """Why a scheme cannot run here; empty if it can. has_keys: it must be encrypted, or stay in this host's memory.
    Raises ConfigError if there is none of that name."""
    module = _module(scheme)
    if has_keys and scheme not in OFF_THE_WIRE and not hasattr(module, "make_encrypted"):
        return "it cannot be encrypted, and the cluster has keys: use zmq or shm, or leave out --keys"
    return module.unavailable()


def is_reachable(scheme: str, description: bytes) -> bool:
    """Whether a peer's description may be connected to from here. Raises ConfigError if there is no such scheme."""
    return _module(scheme).is_reachable(description)


def _make_with(module: _Module, scheme: str, host: str, options: dict[str, Any]) -> Transport:
    make_with = getattr(module, "make_with", None)
    if make_with is None:
        raise ConfigError(f"transport_options: {scheme} has no options")
    return cast(Transport, make_with(host, options))


def _module(scheme: str) -> _Module:
    name = _MODULES.get(scheme)
    if name is None:
        raise ConfigError(f"transport {scheme!r} is unknown; known are {', '.join(SCHEMES)}")
    return cast(_Module, importlib.import_module(name))
