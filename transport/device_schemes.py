"""Which transports move blocks of a device's memory, and how each is told of the device.

    cuda_ipc     maps the peer's memory, and waits for the computation on the device
    nixl, ucx    read the device's memory by themselves, as soon as they are asked: behind the computation

shm and zmq copy by the processor, which cannot read a GPU's memory. Memory and threading: none of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.errors import ConfigError
from transport.base import Transport
from transport.behind import BehindComputation
from transport.cuda_ipc import CudaIpcTransport
from transport.device import Device
from transport.guarded import GuardedTransport
from transport.keys import Keys
from transport.schemes import make_transport

ON_A_DEVICE = ("cuda_ipc", "nixl", "ucx")


def refuse_off_device(transport: str) -> None:
    """Raises ConfigError, with the remedy, unless this scheme moves a device's memory. `auto` does not: it takes what
    was measured, and between GPUs nothing was yet."""
    if transport == "auto":
        raise ConfigError(
            "no transport has been measured between GPUs yet, so none is chosen by itself: give --transport cuda_ipc "
            "for instances of one host, or --transport nixl (or ucx) between hosts"
        )
    if transport not in ON_A_DEVICE:
        raise ConfigError(
            f"--transport {transport} copies by the processor, which cannot read a GPU's memory: give one of "
            f"{', '.join(ON_A_DEVICE)}"
        )


def device_transports(
    transport: str, device: Device, host: str, keys: Keys | None, options: Mapping[str, dict[str, Any]]
) -> dict[str, Transport]:
    """What an instance with its KV cache on `device` offers, by scheme; closing it closes the device. Arguments as of
    `transport.schemes.make_transport`. Raises ConfigError as it and `refuse_off_device` do."""
    refuse_off_device(transport)
    if transport == "cuda_ipc":
        return {transport: CudaIpcTransport(device)}
    # the thread in front of it is a caller too
    guarded = GuardedTransport(make_transport(transport, host, keys, options))
    return {transport: BehindComputation(guarded, device)}
