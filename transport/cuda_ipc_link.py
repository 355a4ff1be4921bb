"""A connected owner of GPU memory, as its connector sees it: memories mapped, one socket, one lane of copies.

Memory model: the owner's allocations are mapped whole. `close` unmaps them before it hangs up, so that the connection's
end is a fence for the owner; it must not be called while a copy runs. Where the owner is this very process (the kernel
says so, not the peer), its memory is used where it lies: CUDA opens no handle in the process that made it.
Threading: constructing it waits (for the owner's thread, and to map) and is done on a thread of its own; everything
else is called under the endpoint's lock and never waits.
"""

from __future__ import annotations

import os

from core.errors import TransferError
from transport.base import Region
from transport.cuda_ipc_wire import MAX_HELLO_BYTES, CudaIpcDescription, decode_hello
from transport.device import Device, Exported
from transport.owner_socket import OwnerSocket


class CudaIpcLink:
    """Raises TransferError if the owner cannot be reached, or its memory cannot be mapped or is not as described."""

    def __init__(self, device: Device, description: CudaIpcDescription) -> None:
        self._device = device
        self._opened: list[int] = []
        try:
            self.owner = OwnerSocket(description.socket)
        except OSError as error:
            raise TransferError(f"cannot reach the peer that owns the GPU memory: {error}") from error
        try:
            addresses = [self._map(memory) for memory in self._fetch(description)]
            self.lane = device.lane()
        except OSError as error:
            self._abandon()
            raise TransferError(f"the peer that owns the GPU memory does not answer: {error}") from error
        except TransferError:
            self._abandon()
            raise
        self.regions: dict[int, Region] = {
            region.id: region.at(addresses[region.memory]) for region in description.regions
        }

    def close(self) -> None:
        """Unmaps, then hangs up. The lane is empty."""
        self.lane.close()
        self._abandon()

    def _fetch(self, description: CudaIpcDescription) -> list[Exported]:
        hello, fds = self.owner.hello(MAX_HELLO_BYTES, 0)
        for fd in fds:  # whoever sends memories this way is not one of us
            os.close(fd)
        return decode_hello(hello, description)

    def _map(self, memory: Exported) -> int:
        if self.owner.pid == os.getpid():
            self._device.check(memory.address, memory.num_bytes)
            return memory.address
        self._opened.append(self._device.open(memory))
        return self._opened[-1]

    def _abandon(self) -> None:
        for address in self._opened:
            self._device.shut(address)
        self._opened.clear()
        self.owner.close()
