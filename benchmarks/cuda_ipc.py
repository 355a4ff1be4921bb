"""cuda_ipc beside a plain device-to-device copy of the same bytes, in one run, between two processes.

    python -m benchmarks.cuda_ipc                  on a GPU; --owner-gpu 1 puts the receiver on another
    python -m benchmarks.cuda_ipc --host           the same code on host memory: shows that it runs, measures no GPU

Three figures per payload, each the median of several turns, from the call until the bytes are known to be in place:

    copy:    one contiguous copy of the payload by the driver, to the same GPU as the receiver's
    write:   one write of all blocks, scattered on both sides
    layers:  the payload as 32 writes, one after the other without waiting, as a model's layers push it

and, since a copy within one GPU takes as long as its launch, the same with eight payloads under way at once. A block is
16 tokens of one layer of the named model. The last line is JSON. The target: write at least 0.8 of copy above 64 MB.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from transport.base import Blocks, Endpoint, Region, Transfer, TransferState
from transport.cuda_device import CudaDevice
from transport.cuda_ipc import CudaIpcTransport, unavailable
from transport.device import Device
from transport.host_device import HostDevice

BLOCK_BYTES = {"qwen2.5-0.5b": 8 << 10, "llama-3-8b": 64 << 10, "deepseek-v3": 18 << 10}
NUM_LAYERS = 32
NUM_TURNS = 9
UNDER_WAY = 8
WAIT_S = 30.0


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


def register(transport: CudaIpcTransport, address: int, num_bytes: int) -> None:
    """The memory as each model's KV cache: one region per model."""
    for index, block_bytes in enumerate(BLOCK_BYTES.values()):
        transport.register(Region(index, address, block_bytes, block_bytes, num_bytes // block_bytes))


def own(is_host: bool, num_bytes: int, gpu: int) -> None:
    """The receiving process: says its description, and lives until its input ends."""
    here = ground(is_host)
    transport = CudaIpcTransport(here.device)
    register(transport, here.memory(num_bytes, gpu), num_bytes)
    print(transport.describe().hex(), flush=True)
    sys.stdin.read()
    transport.close()


@contextmanager
def owner(is_host: bool, num_bytes: int, gpu: int) -> Iterator[bytes]:
    """The receiving process's description."""
    command = [sys.executable, "-m", "benchmarks.cuda_ipc", "--own", str(num_bytes), "--owner-gpu", str(gpu)]
    command += ["--host"] if is_host else []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            yield bytes.fromhex(child.stdout.readline())
        finally:
            child.kill()


def wait(transfers: list[Transfer]) -> None:
    """Until all are done. Raises RuntimeError if one is not."""
    deadline_s = time.monotonic() + WAIT_S
    for transfer in transfers:
        while transfer.poll() is TransferState.RUNNING:
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"a transfer still runs after {WAIT_S} s")
        if transfer.poll() is not TransferState.DONE:
            raise RuntimeError(transfer.failure())


def median_s(work: Callable[[], object]) -> float:
    """Of several turns; the first warms up."""
    times = []
    for _ in range(NUM_TURNS + 1):
        begun_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun_s)
    return statistics.median(times[1:])


def split(blocks: Blocks, parts: int) -> list[Blocks]:
    """In equal parts, as far as they go."""
    size = max(len(blocks.ids) // parts, 1)
    return [Blocks(blocks.region, blocks.ids[at : at + size]) for at in range(0, len(blocks.ids), size)]


def figures(endpoint: Endpoint, local: Blocks, remote: Blocks, copy: Callable[[int], None]) -> dict[str, float]:
    """Seconds per payload by name."""
    layers = list(zip(split(local, NUM_LAYERS), split(remote, NUM_LAYERS), strict=True))
    return {
        "copy": median_s(lambda: copy(1)),
        "write": median_s(lambda: wait([endpoint.write("t", local, remote)])),
        "layers": median_s(lambda: wait([endpoint.write("t", here, there) for here, there in layers])),
        "copies": median_s(lambda: copy(UNDER_WAY)) / UNDER_WAY,
        "writes": median_s(lambda: wait([endpoint.write("t", local, remote) for _ in range(UNDER_WAY)])) / UNDER_WAY,
    }


def measure(is_host: bool, megabytes: list[int], gpu: int) -> list[dict[str, Any]]:
    """A row per model and payload, printed as it comes."""
    num_bytes = max(megabytes) << 20
    here, rows, dice = ground(is_host), [], random.Random(7)
    source, plain = here.memory(num_bytes, 0), here.memory(num_bytes, gpu)
    transport = CudaIpcTransport(here.device)
    register(transport, source, num_bytes)
    with owner(is_host, num_bytes, gpu) as description:
        endpoint = transport.connect(description)
        for region, (model, block_bytes) in enumerate(BLOCK_BYTES.items()):
            for size in megabytes:
                count, total = (size << 20) // block_bytes, num_bytes // block_bytes
                payload = count * block_bytes
                local, remote = (Blocks(region, tuple(dice.sample(range(total), count))) for _ in range(2))
                copy = functools.partial(here.copy, plain, source, payload)
                rows.append({"model": model, "bytes": payload, "blocks": count})
                rows[-1] |= figures(endpoint, local, remote, copy)
                print(line(rows[-1]), flush=True)
        endpoint.close()
    transport.close()
    return rows


def line(row: dict[str, Any]) -> str:
    """GB/s, and the ratios that matter."""
    speed = {name: row["bytes"] / row[name] / 1e9 for name in ("copy", "write", "layers", "copies", "writes")}
    text = "  ".join(f"{name} {value:7.1f}" for name, value in speed.items())
    return (
        f"{row['model']:>13} {row['bytes'] / 1e6:7.0f} MB {row['blocks']:6} blocks   GB/s: {text}   "
        f"write/copy {speed['write'] / speed['copy']:.2f}  under way {speed['writes'] / speed['copies']:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda_ipc", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--host", action="store_true", help="on host memory, which says nothing about a GPU")
    parser.add_argument("--megabytes", default="16,64,256,1024", help="payloads (default: %(default)s)")
    parser.add_argument("--owner-gpu", type=int, default=0, help="the receiver's GPU (default: %(default)s)")
    parser.add_argument("--own", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.own:
        own(options.host, options.own, options.owner_gpu)
        return
    if why := "" if options.host else unavailable():
        sys.exit(f"cuda_ipc cannot run here: {why}")
    rows = measure(options.host, [int(size) for size in options.megabytes.split(",")], options.owner_gpu)
    print(json.dumps({"is_host": options.host, "owner_gpu": options.owner_gpu, "rows": rows}))


if __name__ == "__main__":
    main()
