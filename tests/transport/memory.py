"""One transport with one region, for tests."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from transport.base import Blocks, Endpoint, Landing, Region, Transport
from transport.digest import blocks_digest


class Owned:
    """A transport, and a region of blocks that all hold the byte `fill`."""

    def __init__(self, transport: Transport, block_bytes: int = 4096, num_blocks: int = 8, fill: int = 0) -> None:
        self.transport = transport
        num_bytes = block_bytes * num_blocks
        self._memory = transport.allocate(num_bytes)
        self._buffer = ctypes.create_string_buffer(num_bytes if self._memory is None else 1)
        address = ctypes.addressof(self._buffer) if self._memory is None else self._memory.address
        ctypes.memset(address, fill, num_bytes)
        self.region = Region(0, address, block_bytes, block_bytes, num_blocks)
        transport.register(self.region)

    def blocks(self, ids: Iterable[int]) -> Blocks:
        return Blocks(0, tuple(ids))

    def block(self, block_id: int) -> bytes:
        return ctypes.string_at(self.region.address + block_id * self.region.stride, self.region.block_bytes)

    def put(self, block_id: int, content: bytes) -> None:
        assert len(content) == self.region.block_bytes
        ctypes.memmove(self.region.address + block_id * self.region.stride, content, len(content))

    def expect(self, tag: str, ids: Iterable[int]) -> Landing:
        return self.transport.expect(tag, [self.blocks(ids)])

    def digest(self, ids: Iterable[int]) -> int:
        return blocks_digest(self.region, tuple(ids), 0, full=True)


@contextmanager
def connected(sender: Transport, receiver: Transport) -> Iterator[tuple[Owned, Owned, Endpoint]]:
    """Sender (blocks full of 1), receiver (of 0), and the sender's endpoint."""
    owned = Owned(sender, fill=1), Owned(receiver)
    endpoint = sender.connect(receiver.describe())
    try:
        yield *owned, endpoint
    finally:
        endpoint.close()
        sender.close()
        receiver.close()
