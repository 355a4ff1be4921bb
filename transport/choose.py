"""Which transport joins two instances: made by name, chosen by what both have and what reaches the other.

Memory and threading: none of its own. Transports are imported when they are made or offered, not before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from core.errors import ConfigError, TransferError
from transport.base import Transport


def _inproc(host: str) -> Transport:
    from transport.inproc import InprocTransport

    return InprocTransport()


def _shm(host: str) -> Transport:
    from transport.shm import ShmTransport

    return ShmTransport()


def _zmq(host: str) -> Transport:
    from transport.zmq_tcp import ZmqTransport

    return ZmqTransport(host)


_MAKERS: dict[str, Callable[[str], Transport]] = {"shm": _shm, "zmq": _zmq, "inproc": _inproc}
SCHEMES = tuple(_MAKERS)


def make_transport(scheme: str, host: str) -> Transport:
    """A transport by name. `host`: the address under which peers reach this machine, where that matters."""
    maker = _MAKERS.get(scheme)
    if maker is None:
        raise ConfigError(f"transport {scheme!r} is unknown; known are {', '.join(SCHEMES)}")
    return maker(host)


def choose(
    offers: Sequence[tuple[str, bytes]], own: Mapping[str, Transport], pinned: str | None = None
) -> tuple[str, bytes]:
    """The first offer, best first, that we have too and that can reach us; only `pinned` where it is given.

    Raises TransferError naming both sides' schemes if none fits.
    """
    for scheme, description in offers:
        if scheme in own and scheme == (pinned or scheme) and _is_reachable(scheme, description):
            return scheme, description
    theirs, ours = ", ".join(scheme for scheme, _ in offers) or "none", ", ".join(own) or "none"
    wanted = f"; only {pinned} is wanted" if pinned else ""
    raise TransferError(f"no transport joins both sides: offered {theirs}; ours {ours}{wanted}")


def _is_reachable(scheme: str, description: bytes) -> bool:
    if scheme == "shm":
        from transport import shm_wire

        return shm_wire.is_reachable(description)
    if scheme == "inproc":
        from transport import inproc

        return inproc.is_reachable(description)
    return True
