"""A connected owner of shared memory, as its connector sees it: memories mapped, one socket.

Memory model: the owner's memories are mapped whole and populated; `close` unmaps them before it hangs up, so that the
connection's end is a fence for the owner.
Threading: constructing it waits (for the owner's thread, and 0.3 s per GiB to populate) and is done on a thread of
its own; everything else is called under the endpoint's lock and never waits.
"""

from __future__ import annotations

import contextlib
import os

from core.errors import TransferError
from transport.base import Region
from transport.mapping import Mapping, map_foreign
from transport.owner_socket import OwnerSocket
from transport.shm_wire import MAX_MEMORIES, ShmDescription


class ShmLink:
    """Raises TransferError if the owner cannot be reached or its memory is not as described."""

    def __init__(self, description: ShmDescription) -> None:
        self._memories: list[Mapping] = []
        try:
            self.owner = OwnerSocket(description.socket)
            try:
                fds = self._fetch(description)
                try:
                    self._map(fds, description.memories)
                finally:
                    for fd in fds:
                        os.close(fd)
            except (OSError, TransferError):
                self.close()
                raise
        except OSError as error:
            raise TransferError(f"cannot reach the peer's shared memory: {error}") from error
        self.regions: dict[int, Region] = {
            region.id: region.at(self._memories[region.memory].address) for region in description.regions
        }

    def close(self) -> None:
        """Unmaps, then hangs up."""
        for memory in self._memories:
            memory.close()
        self.owner.close()

    def _fetch(self, description: ShmDescription) -> list[int]:
        hello, fds = self.owner.hello(16, MAX_MEMORIES)
        if not hello or len(fds) != len(description.memories):
            with contextlib.suppress(OSError):
                for fd in fds:
                    os.close(fd)
            raise TransferError("the peer refused, or described other memory than it has")
        return fds

    def _map(self, fds: list[int], sizes: list[int]) -> None:
        for fd, num_bytes in zip(fds, sizes, strict=True):
            memory = map_foreign(fd, num_bytes)
            self._memories.append(memory)
            memory.populate()
