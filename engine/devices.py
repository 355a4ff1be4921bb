"""Where the engine's KV cache lies: in the host's memory, in a GPU's, or, in tests, in a device made of host memory
or behind a CUDA driver in software.

A GPU computes what the engine's thread has launched some time later, and the processor cannot read its memory. So on a
device the hooks only say in which order things are to happen: pushes, stores and digests are given to the device behind
the computation (transport/device.py). docs/design/0018-engine-on-a-device.md. Never run on a GPU yet.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from core.errors import ConfigError, UnsupportedError
from engine.settings import ConnectorSettings
from transport.cuda_device import CudaDevice
from transport.cuda_driver import CudaDriver
from transport.device import Device
from transport.host_device import HostDevice

_PRETENDED = re.compile(r"host(?::(?P<lag>\d+\.\d+))?|driver:(?P<driver>.+)")
"""The setting `device` of a CPU engine in tests: a `HostDevice`, with its lag in seconds after the colon, or a driver's
path."""


def is_on_device(config: Any, settings: ConnectorSettings) -> bool:
    """config: vLLM's. Whether the processor is to leave the KV cache's bytes alone."""
    return bool(settings.device) or config.device_config.device_type != "cpu"


def refuse_on_device(config: Any, settings: ConnectorSettings) -> None:
    """Raises UnsupportedError or ConfigError for what cannot be done with a KV cache on a device, with the remedy."""
    kind = str(config.device_config.device_type)
    if kind not in ("cpu", "cuda") or torch.version.hip is not None:
        what = "an AMD GPU" if torch.version.hip is not None else f"a device of type {kind}"
        raise UnsupportedError(f"hand-off and cache on {what} are not supported; plain instances are: baton serve 0P1D")
    if settings.device and (kind != "cpu" or not _PRETENDED.fullmatch(settings.device)):
        raise ConfigError(
            f"device {settings.device!r}: leave it out; `host`, `host:0.01` and `driver:PATH` are for tests"
        )
    if not is_on_device(config, settings):
        return
    if config.scheduler_config.async_scheduling:
        raise UnsupportedError(
            "asynchronous scheduling gives blocks away that a GPU still writes to: add --no-async-scheduling"
        )
    if settings.audit:
        raise ConfigError("audit fills blocks by the processor, which cannot write to a GPU's memory: leave it out")
    if settings.faulty and kind == "cuda":
        raise ConfigError("faulty damages blocks by the processor, which cannot write to a GPU's memory: leave it out")


def device_of(config: Any, settings: ConnectorSettings) -> Device | None:
    """This worker's; None where the KV cache lies in the host's memory. Raises ConfigError if CUDA cannot start."""
    if not is_on_device(config, settings):
        return None
    pretended = _PRETENDED.fullmatch(settings.device)
    if pretended is None:
        return CudaDevice(lambda: int(torch.cuda.current_stream().cuda_stream))
    if pretended["driver"] is None:
        return HostDevice(float(pretended["lag"] or 0.0))
    device = CudaDevice(driver=CudaDriver(pretended["driver"]))
    device.take(0)
    return device
