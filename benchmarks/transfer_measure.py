"""The measuring part: every system by turns for every payload, so that whatever drifts drifts for all.

    for each model, for each number of pairs:  memories ──▶ processes of all systems ──▶ asleep
        for each payload, for each repeat:  wake one system, move, put it to sleep; then the next one

Blocks are handed out by walks (benchmarks/kv_pool.py) that all systems share: no block comes back before all others.
The first job of each payload is not timed: its target is emptied before and compared afterwards.

Memory: two caches per pair, made here and mapped by every system's processes; shm has a target of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import msgspec

from benchmarks.bar import Bar
from benchmarks.kv_models import KVModel
from benchmarks.kv_pool import PoolShape, Walk, fill
from benchmarks.measure import turned
from benchmarks.mover import WAIT_S, Job
from benchmarks.transfer_pair import Moved, Pair, awake, close_all, move
from benchmarks.transfer_plan import Cell, Sweep, cells_of, pool_shape
from benchmarks.transfer_results import Absence, Sample
from benchmarks.transfer_systems import System
from core.clock import Clock
from core.errors import TransferError
from transport.mapping import Mapping, make_memfd

WARM_UP_BLOCKS = 4
"""Of a job that is not timed, at the beginning of each turn: code is warm then, blocks are not."""


class Measurement:
    """Keeps what was measured, and who could not be."""

    def __init__(self, bar: Bar, clock: Clock, seconds: float = 0.0) -> None:
        """seconds: no turn begins later than this after now, and who is not ready after two thirds is left out; 0: as
        long as it takes."""
        self._bar = bar
        self._clock = clock
        self._deadline_s = clock.monotonic_s() + seconds if seconds else float("inf")
        self._ready_s = self._deadline_s - seconds / 3
        self._num_jobs = 0
        self.samples: list[Sample] = []
        self.absences: list[Absence] = []
        self.is_cut_short = False

    def measure(self, model: KVModel, sweep: Sweep, num_pairs: int, systems: Sequence[System]) -> None:
        """One model with so many pairs."""
        shape = pool_shape(model, sweep)
        walks = Walk(shape.num_blocks, 1), Walk(shape.num_blocks, 2)
        with ExitStack() as stack:
            self._bar.show(f"{model.name}: filling memory")
            caches = [stack.enter_context(memories(shape, index)) for index in range(num_pairs)]
            running = self._start(model, shape, systems, caches, stack)
            for cell in cells_of(model, sweep, num_pairs):
                for turn in range(-1, cell.num_turns):
                    if self._clock.monotonic_s() > self._deadline_s:
                        self.is_cut_short = True
                        return
                    for name in turned(list(running), max(turn, 0)):
                        self._bar.show(f"{cell.model}, {cell.num_bytes / 1e6:,.1f} MB, {cell.grain}, {name}")
                        self._turn(cell, name, running, walks, is_timed=turn >= 0)
                    self._bar.advance(cell.weight * len(systems) / (cell.num_turns + 1))

    def _start(
        self,
        model: KVModel,
        shape: PoolShape,
        systems: Sequence[System],
        memories: Sequence[tuple[int, int]],
        stack: ExitStack,
    ) -> dict[str, list[Pair]]:
        """Those that start; connected and asleep."""
        starting: dict[str, list[Pair]] = {}
        for system in systems:
            starting[system.name] = [Pair(system, shape, *fds) for fds in memories]
        stack.callback(close_all, [pair for pairs in starting.values() for pair in pairs])
        running = {}
        for name, pairs in starting.items():
            self._bar.show(f"{model.name}: starting {name}")
            try:
                for pair in pairs:
                    pair.connect(min(max(self._ready_s - self._clock.monotonic_s(), 1.0), WAIT_S))
                running[name] = pairs
            except TransferError as error:
                self.absences.append(Absence(name, model.name, str(error)))
                for pair in pairs:
                    pair.close()
        return running

    def _turn(
        self, cell: Cell, name: str, running: dict[str, list[Pair]], walks: tuple[Walk, Walk], *, is_timed: bool
    ) -> None:
        """One turn of a system; one that fails is not asked again."""
        pairs = running[name]
        try:
            with awake(pairs):
                if not is_timed:
                    for pair in pairs:
                        pair.check(self._job(cell, walks))
                    return
                warm_up = msgspec.structs.replace(cell, num_blocks=min(cell.num_blocks, WARM_UP_BLOCKS))
                move(pairs, [self._job(warm_up, walks) for _ in pairs], 0.0)
                for _ in range(cell.burst):
                    moved = move(pairs, [self._job(cell, walks) for _ in pairs], cell.layer_s)
                    self.samples.append(_sample(cell, name, moved))
        except TransferError as error:
            self.absences.append(Absence(name, cell.model, f"from {cell.num_bytes / 1e6:,.1f} MB on: {error}"))
            del running[name]
            for pair in pairs:
                pair.close()

    def _job(self, cell: Cell, walks: tuple[Walk, Walk]) -> Job:
        self._num_jobs += 1
        count = max(cell.num_blocks, 1)
        num_writes = cell.num_layers if cell.grain == "layer" else 1
        local, remote = (walk.take(count) for walk in walks)
        return Job(f"job-{self._num_jobs}", local, remote, cell.num_layers, num_writes)


def _sample(cell: Cell, name: str, moved: Sequence[Moved]) -> Sample:
    window_s = max(each.landed_s for each in moved) - min(each.begun_s for each in moved)
    return Sample(
        system=name,
        cell=cell,
        latencies_s=tuple(each.latency_s for each in moved),
        window_s=window_s,
        held_s=sum(each.held_s for each in moved) / len(moved),
        cpu_s=sum(each.cpu_s for each in moved),
    )


@contextmanager
def memories(shape: PoolShape, seed: int) -> Iterator[tuple[int, int]]:
    """A source and a target, every page present, as descriptors."""
    fds: list[int] = []
    try:
        for index in range(2):
            fds.append(make_memfd(shape.num_bytes))
            memory = Mapping(fds[-1], shape.num_bytes)
            memory.populate()
            fill(memory, 2 * seed + index)
            memory.close()
        yield fds[0], fds[1]
    finally:
        for fd in fds:
            os.close(fd)
