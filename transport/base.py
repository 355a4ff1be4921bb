"""The data plane's contract: one-sided block copies between registered memories.

    sending process                                  receiving process
    ┌──────────────────────────┐                     ┌──────────────────────────┐
    │ regions: one per layer   │   Endpoint.write    │ regions: one per layer   │
    │ base, block 0 .. n-1     │ ───────────────────▶│ base, block 0 .. n-1     │
    │                          │  notice after data  │ Landing (one per tag)    │
    └──────────────────────────┘                     └──────────────────────────┘

Memory model: a `Region` is an array of equally sized blocks at a fixed address; block i starts at
`address + i * stride`. One region per attention layer, numbered from 0 in layer order, in both processes.
Life of a transfer: the receiver opens a `Landing` under a tag, naming the blocks that may be written; the sender
writes under that tag, as often as it likes; the last write carries a notice, which arrives after all data of
earlier writes under the same tag; the receiver closes the landing.
Threading: every method may be called from the engine's thread and never waits for a peer. A transport may own
threads. A `Transfer` belongs to whoever started it; nothing is reported through a shared bag.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Protocol

import msgspec


class TransferState(enum.Enum):
    """RUNNING until the bytes are in place (DONE) or never will be (FAILED)."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class Region(msgspec.Struct, frozen=True):
    """An array of blocks in this process: block i is `block_bytes` bytes at `address + i * stride`.

    device: the GPU in whose memory it lies; None for the host's."""

    id: int
    address: int
    block_bytes: int
    stride: int
    num_blocks: int
    device: int | None = None


class Blocks(msgspec.Struct, frozen=True):
    """Some blocks of one region, and the byte range inside each (all of it where num_bytes is 0)."""

    region: int
    ids: tuple[int, ...]
    start: int = 0
    num_bytes: int = 0


class Memory(Protocol):
    """Memory that a transport had to allocate itself (shm). Keep it referenced as long as its address is in use."""

    address: int
    num_bytes: int


class Transfer(Protocol):
    """One batch of block copies in flight. Local memory must stay mapped and as it is until this is not RUNNING.
    Batches may overtake each other; only a notice stays behind what was written before it under its tag."""

    @property
    def copy_s(self) -> float:
        """Seconds that threads of this process have spent copying it, added up; 0 where others move the bytes."""
        ...

    def poll(self) -> TransferState: ...

    def cancel(self) -> None:
        """Stop as soon as possible; ends FAILED unless it was DONE already."""
        ...

    def failure(self) -> str:
        """Why it FAILED, for people; empty otherwise."""
        ...


class Endpoint(Protocol):
    """One connected peer. Connecting happens in the background: writes before it is ready wait inside it."""

    def write(self, tag: str, local: Blocks, remote: Blocks, notice: bytes | None = None) -> Transfer:
        """Copies local blocks into the peer's, pairwise. Returns at once; ids must be equally many.

        Raises TransferError if the arguments do not fit the registered or described regions.
        """
        ...

    def read(self, remote: Blocks, local: Blocks) -> Transfer: ...

    def failure(self) -> str:
        """Why this endpoint can never move anything again; empty while it connects or works."""
        ...

    def close(self) -> None:
        """Ends every write under way. Over shm none will touch the peer's memory after this returned; over a network
        bytes that have left may still arrive: there the fence is the peer's own `Landing.close`."""
        ...


class Landing(Protocol):
    """The receiver's view of what arrives under one tag."""

    def poll(self) -> list[bytes]:
        """Notices that arrived since the last call, each after all data written before it under this tag."""
        ...

    def num_written(self) -> int | None:
        """(region, block) pairs whose bytes arrived completely; None where the transport is one-sided and cannot
        know (shm): there the notice stands for them."""
        ...

    def digest(self) -> int | None:
        """Digest over what arrived (transport/digest.py, every byte); None where the receiver must read it itself."""
        ...

    def peer_gone(self) -> bool:
        """True once whoever was writing under this tag can certainly write no more (its process or connection
        ended)."""
        ...

    def has_writer(self) -> bool:
        """Whether somebody has announced a write under this tag, so that `peer_gone` will tell of its end."""
        ...

    def close(self) -> bool:
        """Stops accepting writes under the tag. True if from now on none can touch the blocks; False where only
        the sender can promise that (shm): then wait for its word, or for `peer_gone`."""
        ...


class Transport(Protocol):
    """One per process and scheme."""

    scheme: str

    def allocate(self, num_bytes: int) -> Memory | None:
        """Memory for the KV cache where the transport must own it before it exists; None: any memory will do."""
        ...

    def register(self, region: Region) -> None: ...

    def describe(self) -> bytes:
        """What a peer needs to connect; opaque, small, to be treated as untrusted input by `connect`."""
        ...

    def connect(self, description: bytes) -> Endpoint:
        """Raises TransferError if the description does not parse or cannot be reached from here."""
        ...

    def expect(self, tag: str, blocks: Sequence[Blocks]) -> Landing:
        """Opens a landing: one `Blocks` per region, all with the same ids in hand-off order. Where a `Blocks` names a
        part of its blocks, that part alone may be written, and is counted and digested."""
        ...

    def close(self) -> None: ...
