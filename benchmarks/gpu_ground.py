"""What benchmarks of a GPU share: where the memories lie, how they are copied without us, and how figures are told.

GpuGround    torch's memory, and its copies
HostGround   host memory and memmove: shows that a benchmark runs, measures no GPU
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from transport.cuda_device import CudaDevice
from transport.device import Device
from transport.host_device import HostDevice

BLOCK_BYTES = {"qwen2.5-0.5b": 8 << 10, "llama-3-8b": 64 << 10, "deepseek-v3": 18 << 10}
"""16 tokens of one layer, by model."""

NUM_TURNS = 9


class Ground(Protocol):
    """Where the memories lie, and how they are copied without us."""

    device: Device

    def memory(self, num_bytes: int, gpu: int) -> int: ...

    def copy(self, target: int, source: int, num_bytes: int, times: int) -> None:
        """So many copies, one behind the other; done when it returns."""
        ...


class HostGround:
    """Host memory and memmove."""

    def __init__(self) -> None:
        self.device: Device = HostDevice()

    def memory(self, num_bytes: int, gpu: int) -> int:
        memory = self.device.allocate(num_bytes)
        assert memory is not None
        return memory.address

    def copy(self, target: int, source: int, num_bytes: int, times: int) -> None:
        for _ in range(times):
            ctypes.memmove(target, source, num_bytes)


class GpuGround:
    """torch's memory, and its copies."""

    def __init__(self) -> None:
        import torch

        self._torch: Any = torch
        self._tensors: dict[int, Any] = {}
        self.device: Device = CudaDevice(lambda: int(torch.cuda.current_stream().cuda_stream))

    def memory(self, num_bytes: int, gpu: int) -> int:
        tensor = self._torch.zeros(num_bytes, dtype=self._torch.uint8, device=f"cuda:{gpu}")
        self._torch.cuda.synchronize(gpu)
        self._tensors[tensor.data_ptr()] = tensor
        return int(tensor.data_ptr())

    def tensor(self, address: int) -> Any:
        """What `memory` made there."""
        return self._tensors[address]

    def copy(self, target: int, source: int, num_bytes: int, times: int) -> None:
        done = self._torch.cuda.Event()
        for _ in range(times):
            self._tensors[target][:num_bytes].copy_(self._tensors[source][:num_bytes], non_blocking=True)
        done.record()
        while not done.query():
            pass


def ground(is_host: bool) -> Ground:
    """On this machine."""
    return HostGround() if is_host else GpuGround()


def median_s(work: Callable[[], object]) -> float:
    """Of several turns; the first warms up."""
    times = []
    for _ in range(NUM_TURNS + 1):
        begun_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun_s)
    return statistics.median(times[1:])


def speeds(row: dict[str, Any], names: Sequence[str]) -> tuple[dict[str, float], str]:
    """Of a row with bytes and the seconds of each name: GB/s, and the line's beginning."""
    speed = {name: row["bytes"] / row[name] / 1e9 for name in names}
    text = "  ".join(f"{name} {value:6.1f}" for name, value in speed.items())
    return speed, f"{row['model']:>13} {row['bytes'] / 1e6:6.0f} MB {row['blocks']:6} blocks   GB/s: {text}   "


def parser_of(name: str, purpose: str | None) -> argparse.ArgumentParser:
    """With what every benchmark of a GPU takes. purpose: its module's text, whose first line is shown."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=(purpose or "").partition("\n")[0]
    )
    parser.add_argument("--host", action="store_true", help="on host memory, which says nothing about a GPU")
    parser.add_argument("--megabytes", default="16,64,256,1024", help="payloads (default: %(default)s)")
    return parser
