"""Blocks between two processes of one host with KV caches in GPU memory: the sender's GPU writes into the receiver's.

    owner (receiver)                               connector (sender)
    register: regions in its GPU's memory          connect: a thread fetches the IPC handles, maps the allocations
    describe: sizes, a socket  ─────────────────▶  write: one kernel copies all blocks, behind the layer's computation
    landing: notices  ◀──────── Unix socket ─────  copy landed: a word

Memory model: regions may lie anywhere in the GPU's memory; a whole allocation is mapped by a peer, never a part. One-
sided as shm: a landing cannot refuse; its fence is the sender's word, or the end of the sender's connection.
Threading: one thread listens (transport/shm_listener.py), one per endpoint (transport/cuda_ipc_endpoint.py).

The rules hold on any `Device` and are tested without a GPU; the CUDA part has never run on one: MEASURED says so, and
docs/design/0011-cuda-ipc.md what is known from the documentation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from core.errors import TransferError
from transport.base import Blocks, Memory, Region
from transport.cuda_device import CudaDevice, unavailable
from transport.cuda_ipc_endpoint import CudaIpcEndpoint
from transport.cuda_ipc_wire import (
    MAX_MEMORIES,
    VERSION,
    CudaIpcDescription,
    check_reachable,
    decode_description,
    encode_description,
    encode_hello,
    is_reachable,
    process_host_id,
)
from transport.device import Device, Exported
from transport.landing import expected_positions
from transport.regions import check_region, check_words
from transport.shm_letterbox import Letterbox, ShmLanding
from transport.shm_listener import Greeting, ShmListener
from transport.shm_wire import RegionInMemory

__all__ = ["MEASURED", "CudaIpcTransport", "is_reachable", "make", "unavailable"]

MEASURED = False
"""Whether this scheme's speed was ever measured on its hardware: if not, it is never chosen by itself."""


def make(host: str, compute_stream: Callable[[], int] | None = None) -> CudaIpcTransport:
    """See transport/schemes.py; the host does not matter. compute_stream: the CUDA stream that computes now; without it
    a write waits for everything the GPU was given by this process. Raises ConfigError if CUDA cannot start here."""
    return CudaIpcTransport(CudaDevice(compute_stream))


class CudaIpcTransport:
    """See transport/base.py."""

    def __init__(self, device: Device) -> None:
        self.scheme = "cuda_ipc"
        self._device = device
        self._regions: dict[int, Region] = {}
        self._memories: list[Exported] = []
        self._box = Letterbox()
        self._listener: ShmListener | None = None
        self._is_closed = False

    @property
    def malformed(self) -> int:
        """Packets that were dropped because they do not parse or exceed a bound."""
        return 0 if self._listener is None else self._listener.malformed

    def allocate(self, num_bytes: int) -> Memory | None:
        return self._device.allocate(num_bytes)

    def register(self, region: Region) -> None:
        """Raises TransferError if the region's memory is not the GPU's."""
        check_region(region, self._regions)
        self._device.check(region.address, _extent(region))
        self._regions[region.id] = region

    def describe(self) -> bytes:
        """Raises TransferError, with the remedy, if a region's memory cannot be shared with another process."""
        self._check_open()
        regions = [self._place(region) for region in self._regions.values()]
        if self._listener is None:
            self._listener = ShmListener(self._box, lambda: Greeting(encode_hello(self._memories), []))
        return encode_description(
            CudaIpcDescription(
                cuda_ipc=VERSION,
                host=process_host_id(),
                uid=os.getuid(),
                socket=self._listener.name,
                devices=[memory.device for memory in self._memories],
                memories=[memory.num_bytes for memory in self._memories],
                regions=regions,
            )
        )

    def connect(self, description: bytes) -> CudaIpcEndpoint:
        self._check_open()
        parsed = decode_description(description)
        check_reachable(parsed)
        return CudaIpcEndpoint(self._device, self._regions, parsed)

    def expect(self, tag: str, blocks: Sequence[Blocks]) -> ShmLanding:
        check_words(tag, None)
        expected_positions(blocks, self._regions)
        return self._box.open(tag)

    def close(self) -> None:
        """Hangs up. Endpoints are closed by their owners; the memory is the engine's."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._listener is not None:
            self._listener.close()
        self._device.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise TransferError("the transport is closed")

    def _place(self, region: Region) -> RegionInMemory:
        """Where a region lies in an allocation, which is exported if it was not yet."""
        index = self._memory_of(region)
        memory = self._memories[index]
        offset = region.address - memory.address
        if offset + _extent(region) > memory.num_bytes:
            raise TransferError(f"region {region.id} lies in several allocations of GPU memory: cuda_ipc needs one")
        return RegionInMemory(region.id, index, offset, region.block_bytes, region.stride, region.num_blocks)

    def _memory_of(self, region: Region) -> int:
        for index, memory in enumerate(self._memories):
            if memory.address <= region.address < memory.address + memory.num_bytes:
                return index
        if len(self._memories) >= MAX_MEMORIES:
            raise TransferError(f"the KV cache lies in more than {MAX_MEMORIES} allocations of GPU memory")
        self._memories.append(self._device.export(region.address))
        return len(self._memories) - 1


def _extent(region: Region) -> int:
    """Bytes from a region's first to its last."""
    return (region.num_blocks - 1) * region.stride + region.block_bytes
