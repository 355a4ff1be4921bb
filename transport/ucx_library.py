"""The UCX library: imported late, set up without touching the environment, its contexts used again.

    load()                       the module of `ucxx`'s synchronous API, imported once
    lease(host) ──▶ context ──▶ give_back

Settings are those of a context (`_settings`), so other users of UCX in this process (NIXL) keep theirs; importing ucxx
itself changes the environment, which is put back. A variable that the user has set wins, but for `_FIXED`.

Memory model: a context keeps a few descriptors open and is never freed by ucxx while any request of it lives, so
contexts of closed transports are kept for the next one; there are as many as were ever in use at the same time.
Threading: any thread; a context belongs to one transport at a time.
"""

from __future__ import annotations

import fcntl
import functools
import ipaddress
import os
import socket
import struct
import threading
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from transport.address import bind_address
from transport.ucx_wire import MAX_MESSAGE_BYTES

REMEDY = "pip install 'baton-serve[ucx]' (or ucxx-cu12 where the driver is for CUDA 12)"
_SEGMENT_BYTES = MAX_MESSAGE_BYTES + (16 << 10)
_SIOCGIFADDR = 0x8915
_FIXED = frozenset({"RNDV_SCHEME"})
"""What even the user's environment does not change: UCX 1.21 crashes where a peer dies in the middle of a rendezvous
over TCP, which this scheme rules out."""

_PATH_SETTINGS = ("TLS", "NET_DEVICES", "RNDV_THRESH", "TCP_TX_SEG_SIZE", "TCP_RX_SEG_SIZE")
"""What decides how a payload travels; where the user has set one, a rendezvous is possible."""

_spare: dict[tuple[tuple[str, str], ...], list[Any]] = {}
_spare_lock = threading.Lock()


def why_unavailable() -> str:
    """Why UCX cannot be used in this process; empty if it can."""
    if find_spec("ucxx") is None:
        return f"the Python package ucxx is not installed; remedy: {REMEDY}"
    try:
        load()
    except Exception as error:  # noqa: BLE001 - whatever a broken installation raises, the other schemes must live on
        return f"ucxx is installed but cannot be loaded ({error}); remedy: {REMEDY}"
    return ""


@functools.cache
def load() -> Any:
    """ucxx's synchronous API. What its import sets in the environment, for every user of UCX here, is taken back."""
    before = dict(os.environ)
    try:
        return import_module("ucxx._lib.libucxx")
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]


@functools.cache
def load_arrays() -> Any:
    """ucxx's view of memory."""
    load()
    return import_module("ucxx._lib.arr")


def make_current(device: int) -> None:
    """The GPU's context becomes the calling thread's own."""
    import_module("ucxx._cuda_context").ensure_cuda_context(device)


class Lease:
    """A context of the library, for one transport. is_tcp_alone: every payload comes as one segment over TCP, so none
    by a rendezvous. Raises ConfigError if the host is not ours."""

    def __init__(self, host: str) -> None:
        own = {
            name: value for name, value in _settings(host).items() if name in _FIXED or f"UCX_{name}" not in os.environ
        }
        self.is_tcp_alone = not _rdma_ports() and not any(f"UCX_{name}" in os.environ for name in _PATH_SETTINGS)
        self._key = tuple(sorted(own.items()))
        with _spare_lock:
            spare = _spare.setdefault(self._key, [])
            known = spare.pop() if spare else None
        library = load()
        try:
            features = (library.Feature.TAG, library.Feature.WAKEUP)
            self.context = known if known is not None else library.UCXContext(own, features)
        except Exception as error:
            raise ConfigError(f"UCX cannot be set up for host {host!r}: {error}") from error

    def give_back(self) -> None:
        """The context is free for the next transport."""
        with _spare_lock:
            _spare[self._key].append(self.context)


def numeric_address(host: str) -> str:
    """Raises ConfigError if the host is unknown or stands for every address."""
    return bind_address(host).removeprefix("tcp://").removesuffix(":*").strip("[]")


def _settings(host: str) -> dict[str, str]:
    """What differs from UCX's defaults, without the prefix UCX_.

    Devices: the interface of `host` alone (UCX listens on each device that it may use), and what RDMA there is.
    Segments: a payload travels as one segment over TCP, so it arrives whole or not at all, and no receive is left
    half done when a peer dies; 144K against the default of 8K also doubles what TCP moves.
    Rendezvous: the library's own thresholds (TCP above one segment, so never; RDMA and GPU memory from a few KiB on),
    and always fetched by the receiver, so that nobody else writes into its memory.
    """
    address = numeric_address(host)
    return {
        "NET_DEVICES": ",".join([interface_of(address), *_rdma_ports()]),
        "TCP_AF_PRIO": "inet6" if ":" in address else "inet",
        "TCP_TX_SEG_SIZE": str(_SEGMENT_BYTES),
        "TCP_RX_SEG_SIZE": str(2 * _SEGMENT_BYTES),
        "RNDV_THRESH": "auto",
        "RNDV_SCHEME": "get_zcopy",
    }


def interface_of(address: str) -> str:
    """The name of the interface whose address this is. Raises ConfigError if there is none."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    known: dict[str, list[str]] = {}
    for _, name in socket.if_nameindex():
        known[name] = [*_ipv4_of(name), *_ipv6_of(name)]
        if str(parsed) in known[name]:
            return name
    listed = "; ".join(f"{name}: {', '.join(addresses)}" for name, addresses in known.items() if addresses)
    raise ConfigError(f"UCX listens on interfaces, and {address} is the address of none of them ({listed})")


def _ipv4_of(name: str) -> list[str]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError:
            return []
    return [socket.inet_ntoa(answer[20:24])]


def _ipv6_of(name: str) -> list[str]:
    table = Path("/proc/net/if_inet6")
    rows = [line.split() for line in table.read_text().splitlines()] if table.exists() else []
    return [str(ipaddress.IPv6Address(int(row[0], 16))) for row in rows if row[-1] == name]


def _rdma_ports() -> list[str]:
    """As UCX names them: device:port."""
    devices = Path("/sys/class/infiniband")
    return sorted(f"{port.parent.parent.name}:{port.name}" for port in devices.glob("*/ports/*"))
