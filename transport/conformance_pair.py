"""Two transports with memory, connected, for whoever checks them: what lies where, block by block.

Memory model: a `Party` is a transport with three regions of different shapes in one memory, allocated by the
transport or else a plain buffer that outlives it. Gaps between blocks are part of the memory. Memory that this
processor cannot address reads and writes itself (`FarMemory`).
Threading: everything runs on the caller's thread; every wait is bounded.
"""

from __future__ import annotations

import ctypes
import functools
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from transport.base import Blocks, Endpoint, Landing, Region, Transfer, TransferState, Transport
from transport.digest import add, bytes_digest

Maker = Callable[[], Transport]

WAIT_S = 10.0
QUIET_S = 0.05
_SHAPES = ((4096, 4096, 24), (1000, 1216, 40), (3 << 19, 3 << 19, 4))
"""block_bytes, stride, num_blocks: dense pages, odd blocks with gaps, blocks larger than a frame."""


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = WAIT_S) -> None:
    """Polls until the condition holds; raises AssertionError after timeout_s."""
    deadline_s = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
        pause.wait(0.0005)


def finish(*transfers: Transfer, state: TransferState = TransferState.DONE) -> None:
    """Waits until the transfers have ended, and checks how."""
    wait_for(lambda: all(t.poll() is not TransferState.RUNNING for t in transfers), "transfers end")
    for transfer in transfers:
        assert transfer.poll() is state, f"{transfer.poll()}: {transfer.failure()}"
        assert bool(transfer.failure()) == (state is TransferState.FAILED), "a failure has a reason, and only it"


@runtime_checkable
class FarMemory(Protocol):
    """Memory that this process's processor cannot address (a GPU's): a transport's `allocate` may return it here."""

    address: int

    def read(self, offset: int, num_bytes: int) -> bytes: ...

    def write(self, offset: int, content: bytes) -> None: ...


class NearMemory:
    """Memory like any other."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.address = address
        self._all = memoryview((ctypes.c_char * num_bytes).from_address(address)).cast("B")

    def read(self, offset: int, num_bytes: int) -> bytes:
        return bytes(self._all[offset : offset + num_bytes])

    def write(self, offset: int, content: bytes) -> None:
        self._all[offset : offset + len(content)] = content


class Party:
    """One transport, its memory and regions."""

    def __init__(self, transport: Transport, seed: int) -> None:
        self.transport = transport
        num_bytes = sum(stride * num_blocks + 4096 for _, stride, num_blocks in _SHAPES)
        self._memory = transport.allocate(num_bytes)
        self._buffer = ctypes.create_string_buffer(num_bytes if self._memory is None else 1)
        address = ctypes.addressof(self._buffer) if self._memory is None else self._memory.address
        near = NearMemory(address, num_bytes)
        self._bytes: FarMemory = self._memory if isinstance(self._memory, FarMemory) else near
        self._bytes.write(0, _content(seed, num_bytes))
        self._num_bytes = num_bytes
        self.regions: list[Region] = []
        for index, (block_bytes, stride, num_blocks) in enumerate(_SHAPES):
            self.regions.append(Region(index, address, block_bytes, stride, num_blocks))
            transport.register(self.regions[-1])
            address += stride * num_blocks + 4096

    def snapshot(self) -> bytearray:
        """All memory, gaps included."""
        return bytearray(self._bytes.read(0, self._num_bytes))

    def block(self, region: int, block_id: int) -> bytes:
        """One block's bytes."""
        return self._bytes.read(self._slice(region, block_id).start, self.regions[region].block_bytes)

    def put(self, snapshot: bytearray, region: int, block_id: int, content: bytes, start: int = 0) -> None:
        """Writes into a snapshot what a block should hold."""
        first = self._slice(region, block_id).start + start
        snapshot[first : first + len(content)] = content

    def digest(self, expected: Sequence[Blocks]) -> int:
        """Over every byte of these blocks, or of the part that each names, as they lie in memory."""
        total = 0
        for blocks in expected:
            end = blocks.start + blocks.num_bytes if blocks.num_bytes else None
            for position, block_id in enumerate(blocks.ids):
                part = self.block(blocks.region, block_id)[blocks.start : end]
                total = add(total, bytes_digest(part, blocks.region, position))
        return total

    def _slice(self, region: int, block_id: int) -> slice:
        shape = self.regions[region]
        first = shape.address - self._bytes.address + block_id * shape.stride
        return slice(first, first + shape.block_bytes)


class Pair:
    """A sender connected to a receiver."""

    def __init__(self, sender: Party, receiver: Party) -> None:
        self.sender = sender
        self.receiver = receiver
        self.endpoint: Endpoint = sender.transport.connect(receiver.transport.describe())

    def expect(self, tag: str, *blocks: Blocks) -> Landing:
        return self.receiver.transport.expect(tag, blocks)


@contextmanager
def connected(maker: Maker) -> Iterator[Pair]:
    """Two fresh transports, connected, closed in the end."""
    sender, receiver = Party(maker(), 1), Party(maker(), 2)
    try:
        pair = Pair(sender, receiver)
        try:
            yield pair
        finally:
            pair.endpoint.close()
    finally:
        sender.transport.close()
        receiver.transport.close()


@functools.cache
def _content(seed: int, num_bytes: int) -> bytes:
    return random.Random(seed).randbytes(num_bytes)
