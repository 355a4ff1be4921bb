"""Blocks between two processes of one host: the sender maps the receiver's memory and writes into it.

    owner (receiver)                               connector (sender)
    allocate: memfd, mapped ──┐                    connect: a thread fetches the memfd, maps and populates it
    register: regions in it   └── SCM_RIGHTS ────▶ write: memmove, then a word on the socket

Memory model: the owner's regions lie in memories that `allocate` made; a region elsewhere can be a source or a read
target but is not described to peers. A mapping lives until its last reference goes, so the engine's tensors outlive
`close`. One-sided: a landing cannot refuse; its fence is the sender's word, or the end of the sender's connection.
Threading: one thread listens (transport/shm_listener.py); see transport/shm_endpoint.py for the connector's, and
transport/shared_copies.py for those that help it copy.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from core.errors import TransferError
from transport.base import Blocks, Region
from transport.landing import expected_positions
from transport.mapping import Mapping, make_memfd
from transport.regions import check_region, check_words
from transport.shared_copies import Helpers
from transport.shm_endpoint import ShmEndpoint
from transport.shm_letterbox import Letterbox, ShmLanding
from transport.shm_listener import Greeting, ShmListener
from transport.shm_wire import (
    MAX_MEMORIES,
    RegionInMemory,
    ShmDescription,
    decode_description,
    encode_description,
    host_id,
    is_reachable,
)

__all__ = ["ShmTransport", "is_reachable", "make", "unavailable"]


def make(host: str) -> ShmTransport:
    """See transport/schemes.py; the host does not matter."""
    return ShmTransport()


def unavailable() -> str:
    """See transport/schemes.py."""
    return "" if hasattr(os, "memfd_create") else "this system has no memfd_create: Linux only"


class ShmTransport:
    """See transport/base.py."""

    def __init__(self) -> None:
        self.scheme = "shm"
        self._regions: dict[int, Region] = {}
        self._memories: list[Mapping] = []
        self._memfds: list[int] = []
        self._box = Letterbox()
        self._helpers = Helpers()
        self._listener: ShmListener | None = None
        self._is_closed = False

    @property
    def malformed(self) -> int:
        """Packets that were dropped because they do not parse or exceed a bound."""
        return 0 if self._listener is None else self._listener.malformed

    def allocate(self, num_bytes: int) -> Mapping:
        """Zeroed memory, every page present. Before `describe`."""
        if self._listener is not None or len(self._memories) >= MAX_MEMORIES:
            raise TransferError("shared memory must be allocated before it is described")
        if num_bytes < 1:
            raise TransferError(f"cannot allocate {num_bytes} bytes")
        fd = make_memfd(num_bytes)
        try:
            memory = Mapping(fd, num_bytes)
            memory.populate()
        except TransferError:
            os.close(fd)
            raise
        self._memfds.append(fd)
        self._memories.append(memory)
        return memory

    def register(self, region: Region) -> None:
        check_region(region, self._regions)
        self._regions[region.id] = region

    def describe(self) -> bytes:
        self._check_open()
        if self._listener is None:
            self._listener = ShmListener(self._box, lambda: Greeting(b"baton", self._memfds))
        regions = [placed for region in self._regions.values() if (placed := self._place(region)) is not None]
        sizes = [memory.num_bytes for memory in self._memories]
        return encode_description(ShmDescription(host_id(), os.getuid(), self._listener.name, sizes, regions))

    def connect(self, description: bytes) -> ShmEndpoint:
        self._check_open()
        parsed = decode_description(description)
        if parsed.host_id != host_id():
            raise TransferError("the peer's memory is on another host, or in another container")
        if parsed.uid != os.getuid():
            raise TransferError(f"the peer runs as user {parsed.uid}, we as {os.getuid()}")
        return ShmEndpoint(self._regions, parsed, self._helpers, self._listener)

    def expect(self, tag: str, blocks: Sequence[Blocks]) -> ShmLanding:
        check_words(tag, None)
        expected_positions(blocks, self._regions)
        return self._box.open(tag)

    def close(self) -> None:
        """Hangs up. Endpoints are closed by their owners; mapped memory stays while it is referenced."""
        self._is_closed = True
        self._helpers.close()
        if self._listener is not None:
            self._listener.close()
        for fd in self._memfds:
            os.close(fd)
        self._memfds.clear()
        self._memories.clear()

    def _check_open(self) -> None:
        if self._is_closed:
            raise TransferError("the transport is closed")

    def _place(self, region: Region) -> RegionInMemory | None:
        """Where a region lies in our memories; None for one that lies elsewhere."""
        end = region.address + (region.num_blocks - 1) * region.stride + region.block_bytes
        for index, memory in enumerate(self._memories):
            if memory.address <= region.address and end <= memory.address + memory.num_bytes:
                offset = region.address - memory.address
                shape = (region.block_bytes, region.stride, region.num_blocks)
                return RegionInMemory(region.id, index, offset, *shape)
        return None
