"""How blocks get from an engine's memory into the arena and back: what the loading and the storing worker need of it.

    Reads    one load: every block of it, each compared with its digest       kvcache/host_copies.py: the processor
    Writes   one step's store, layer by layer as the step computes             kvcache/device_copies.py: a GPU

Threads: `Reads.mark` and everything of `Writes` are for the engine's worker thread, `Reads.read_all` for the loading
thread, `close` for the worker thread after both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvcache.arena import MappedArena
from kvcache.orders import Piece
from kvcache.wire import Written
from transport.device import Moment


class Reads(Protocol):
    """How the blocks of a load come into the engine's memory."""

    def mark(self) -> Moment | None:
        """When a load is ordered: what the computation was given so far comes before it. None where that is done
        already. Released by whoever asked. Raises TransferError if a device has failed."""
        ...

    def read_all(self, arena: MappedArena, pieces: Sequence[Piece], ordered: Moment | None) -> list[Written]:
        """Copies every piece, and returns those that differ from what was stored; waits. Nothing is being copied when
        it returns, nor when it raises TransferError. ordered: of `mark`."""
        ...

    def close(self) -> None: ...


class Writing(Protocol):
    """One step's store of one request."""

    def copy(self, layer: int) -> None:
        """Right after the layer was computed, or on a device was given to it. Raises TransferError."""
        ...

    def end(self) -> list[int]:
        """The digests of this rank's part of every piece, once all that `copy` was called for has been copied; waits.
        Raises TransferError if something failed. Nothing is being copied then."""
        ...


class Writes(Protocol):
    """How a step's finished blocks come into the arena."""

    def begin(self, arena: MappedArena, pieces: Sequence[Piece]) -> Writing: ...

    def close(self) -> None: ...
