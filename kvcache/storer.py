"""The storing worker: copies finished blocks into the arena, layer by layer, in the pass that also pushes them.

    forward pass:   layer 0 ──▶ layer 1 ──▶ ... ──▶ layer L-1     sweep    the step's blocks are complete in the arena
    store:             └─ blocks ─┘└─ blocks ─┘ ...

Every store is of one step: its blocks are final when the step's layer has run, and cannot be reused before the step
ends. A copy that fails gives the block up.

Memory and threads: the engine's worker thread only; whoever copies (kvcache/copies.py), nothing is being copied any
more when a step has ended.
"""

from __future__ import annotations

from collections.abc import Container

from core.clock import Clock
from core.errors import TransferError
from kvcache.arena import Arena, MappedArena
from kvcache.copies import Writes, Writing
from kvcache.host_copies import HostWrites
from kvcache.orders import CacheResults, Store, Stored
from kvcache.wire import Written
from transport.faultpoint import FaultPoint

_TOO_LATE = "the reservation's deadline has passed"


class _Job:
    """One step's store of one request."""

    def __init__(self, store: Store, arena: MappedArena, writing: Writing, num_layers: int) -> None:
        self.store = store
        self.arena = arena
        self.writing = writing
        self.digests: list[int] = []
        self.missing = set(range(num_layers))
        self.why_failed = ""


class Storer:
    """All stores of one worker."""

    def __init__(
        self, arena: Arena, num_layers: int, clock: Clock, faults: FaultPoint, writes: Writes | None = None
    ) -> None:
        """writes: None: by the processor."""
        self._arena = arena
        self._writes = writes or HostWrites()
        self._num_layers = num_layers
        self._clock = clock
        self._faults = faults
        self._jobs: list[_Job] = []
        self._given_up: list[Stored] = []
        self._num_bytes = 0
        self._seconds = 0.0

    def begin_step(self, stores: list[Store]) -> list[Store]:
        """Takes one step's orders, before its forward pass; returns those whose arena is not mapped here (yet)."""
        unmapped = []
        for store in stores:
            arena = self._arena.get(store.arena_id)
            if arena is None:
                self._given_up.append(_give_up(store))
                unmapped.append(store)
            else:
                self._begin(store, arena)
        return unmapped

    def save_layer(self, layer: int) -> None:
        """Called right after `layer` has written its keys and values."""
        for job in self._jobs:
            if layer in job.missing and not job.why_failed:
                self._faults.reach("store", layer=layer)
                self._copy(job, layer)

    def spoil(self, request_ids: Container[str] | None = None) -> None:
        """What these requests compute in this step is of no use; None: what anybody computes."""
        for job in self._jobs:
            if request_ids is None or job.store.request_id in request_ids:
                job.why_failed = job.why_failed or "it was computed from blocks that are not what they should be"

    def end_step(self, results: CacheResults) -> None:
        """Copies what the layers' hooks have left, and says what is complete."""
        for job in self._jobs:
            for layer in sorted(job.missing):
                if not job.why_failed:
                    self._copy(job, layer)
            self._seal(job)
            results.stored.append(self._stored(job))
        results.stored += self._given_up
        self._jobs, self._given_up = [], []
        results.store_bytes, results.store_seconds = self._num_bytes, self._seconds
        self._num_bytes, self._seconds = 0, 0.0

    def close(self) -> None:
        """After the last step."""
        self._writes.close()

    def _begin(self, store: Store, arena: MappedArena) -> None:
        try:
            writing = self._writes.begin(arena, store.pieces)
        except TransferError:
            self._given_up.append(_give_up(store))
        else:
            self._jobs.append(_Job(store, arena, writing, self._num_layers))

    def _copy(self, job: _Job, layer: int) -> None:
        begun_s = self._clock.monotonic_s()
        if begun_s > job.store.deadline_s:
            job.why_failed = _TOO_LATE
            return
        try:
            job.writing.copy(layer)
        except TransferError as error:
            job.why_failed = str(error)
        job.missing.discard(layer)
        self._seconds += self._clock.monotonic_s() - begun_s

    def _seal(self, job: _Job) -> None:
        """Waits until nothing is being copied any more, also of a job that has failed."""
        begun_s = self._clock.monotonic_s()
        try:
            job.digests = job.writing.end()
        except TransferError as error:
            job.why_failed = job.why_failed or str(error)
        self._seconds += self._clock.monotonic_s() - begun_s
        if self._clock.monotonic_s() > job.store.deadline_s:
            job.why_failed = job.why_failed or _TOO_LATE
        if not job.why_failed:
            for piece, digest in zip(job.store.pieces, job.digests, strict=True):
                job.arena.seal(piece.offset, digest)

    def _stored(self, job: _Job) -> Stored:
        store = job.store
        if job.why_failed:
            return _give_up(store)
        self._num_bytes += len(store.pieces) * job.arena.part_bytes
        written = [Written(p.key, p.offset, d) for p, d in zip(store.pieces, job.digests, strict=True)]
        return Stored(store.request_id, store.epoch, written)


def _give_up(store: Store) -> Stored:
    return Stored(store.request_id, store.epoch, [], [piece.key for piece in store.pieces])
