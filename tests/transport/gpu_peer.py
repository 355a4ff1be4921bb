"""An owner of GPU memory in a process of its own, for tests and for nothing else. Speaks JSON lines.

python -m tests.transport.gpu_peer BLOCK_BYTES NUM_BLOCKS      says its description, then what it sees, line by line
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch

from transport.base import Blocks, Region
from transport.cuda_device import CudaDevice
from transport.cuda_ipc import CudaIpcTransport

LEAD_BYTES = 1 << 16
"""Regions begin inside an allocation, as an engine's layers do."""


class TorchMemory:
    """A `transport.conformance.FarMemory` from torch's allocator."""

    def __init__(self, num_bytes: int) -> None:
        self._tensor = torch.zeros(LEAD_BYTES + num_bytes, dtype=torch.uint8, device="cuda")[LEAD_BYTES:]
        self.address = self._tensor.data_ptr()
        self.num_bytes = num_bytes

    def read(self, offset: int, num_bytes: int) -> bytes:
        return bytes(self._tensor[offset : offset + num_bytes].cpu().numpy())

    def write(self, offset: int, content: bytes) -> None:
        source = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        self._tensor[offset : offset + len(content)].copy_(source)

    def fill(self, offset: int, num_bytes: int, byte: int) -> None:
        """On the stream that computes now."""
        self._tensor[offset : offset + num_bytes].fill_(byte)


class TorchGpu(CudaDevice):
    """A `CudaDevice` that follows torch's current stream, and takes memory from torch."""

    def __init__(self) -> None:
        stream: Callable[[], int] = lambda: torch.cuda.current_stream().cuda_stream  # noqa: E731
        super().__init__(stream)

    def allocate(self, num_bytes: int) -> TorchMemory:
        return TorchMemory(num_bytes)


class GpuOwned:
    """A transport with one region in GPU memory."""

    def __init__(self, block_bytes: int, num_blocks: int) -> None:
        self.transport = CudaIpcTransport(TorchGpu())
        self.memory = TorchMemory(block_bytes * num_blocks)
        self.region = Region(0, self.memory.address, block_bytes, block_bytes, num_blocks)
        self.transport.register(self.region)

    def block(self, block_id: int) -> bytes:
        return self.memory.read(block_id * self.region.stride, self.region.block_bytes)


def main(block_bytes: int, num_blocks: int) -> None:
    owned = GpuOwned(block_bytes, num_blocks)
    landing = owned.transport.expect("t", [Blocks(0, tuple(range(num_blocks)))])
    print(json.dumps(owned.transport.describe().hex()), flush=True)
    for _ in sys.stdin:
        notices = [notice.decode() for notice in landing.poll()]
        firsts = [owned.block(block_id)[0] for block_id in range(num_blocks)]
        print(json.dumps({"notices": notices, "firsts": firsts, "gone": landing.peer_gone()}), flush=True)
    owned.transport.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
