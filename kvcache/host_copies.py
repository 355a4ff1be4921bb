"""Blocks between the host's memory and the arena, copied by the processor, each layer hashed while it is in its cache.

One core does not use up a memory's bandwidth, so the blocks of a large load are shared out among a few threads. A store
rides on the step that computes its blocks, and each copy has ended when its call returns.
Threads: see kvcache/copies.py; the copying threads (kvcache/copiers.py) help with loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, wait

from kvcache.arena import MappedArena, add
from kvcache.copiers import Copiers
from kvcache.orders import Piece
from kvcache.wire import Written
from transport.device import Moment
from transport.faultpoint import FaultPoint

MIN_SHARED_BYTES = 8 << 20
"""A smaller load is over before another thread is awake."""


class HostReads:
    """See kvcache/copies.py: Reads."""

    def __init__(self, copiers: Copiers, faults: FaultPoint) -> None:
        self._copiers = copiers
        self._faults = faults

    def mark(self) -> None:
        return

    def read_all(self, arena: MappedArena, pieces: Sequence[Piece], ordered: Moment | None = None) -> list[Written]:
        """Every thread has ended when it returns, also where one raises."""
        num_threads = self._copiers.num_threads
        is_shared = num_threads > 1 and len(pieces) * arena.part_bytes >= MIN_SHARED_BYTES
        if not is_shared:
            return self._read(arena, pieces, 0, 1)
        others: list[Future[list[Written]]] = []
        try:
            others.extend(
                self._copiers.submit(self._read, arena, pieces, first, num_threads) for first in range(1, num_threads)
            )
            bad = self._read(arena, pieces, 0, num_threads)
        finally:
            wait(others)
        return bad + [each for other in others for each in other.result()]

    def close(self) -> None:
        return

    def _read(self, arena: MappedArena, pieces: Sequence[Piece], first: int, step: int) -> list[Written]:
        """Every `step`-th block from `first` on, as far as the first that differs."""
        for index in range(first, len(pieces), step):
            piece = pieces[index]
            self._faults.reach("load", chunk=index)
            if not arena.read_block(piece.block_id, piece.offset, piece.key, piece.digest):
                return [Written(piece.key, piece.offset, piece.digest)]
        return []


class HostWriting:
    """See kvcache/copies.py: Writing."""

    def __init__(self, arena: MappedArena, pieces: Sequence[Piece]) -> None:
        self._arena = arena
        self._pieces = pieces
        self._digests = [arena.first_summand(piece.key) for piece in pieces]

    def copy(self, layer: int) -> None:
        for index, piece in enumerate(self._pieces):
            summand = self._arena.write_layer(layer, piece.block_id, piece.offset)
            self._digests[index] = add(self._digests[index], summand)

    def end(self) -> list[int]:
        return self._digests


class HostWrites:
    """See kvcache/copies.py: Writes."""

    def begin(self, arena: MappedArena, pieces: Sequence[Piece]) -> HostWriting:
        return HostWriting(arena, pieces)

    def close(self) -> None:
        return
