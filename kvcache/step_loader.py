"""Loads that are part of a step: the forward pass begins at once and waits, layer by layer, for what it computes with.

    helpers:     layer 0 ━━ layer 1 ━━ layer 2 ━━ ... ━━ layer L-1       every block of a layer, then the next layer
    engine:        wait 0 ▶ attention 0 ▶ wait 1 ▶ attention 1 ▶ ...     copies itself where it would have to wait
    step's end:                                                          digests are whole now: compared

A block counts only after its digest was compared, and that is known when its last layer has come: until then what the
step has computed is on trial. Whoever orders such a load must throw away all of it if the answer says why.

The block in which the step goes on writing is loaded whole before the first layer: vLLM writes a layer's new keys and
values before it asks for the layer.

Memory and threads: the engine's worker thread calls; helpers (kvcache/copiers.py) copy, into blocks that belong to a
request that is in the step, and none of them does when `end` returns. To wait for a helper is to wait for a memcpy of
this process, so that has no deadline.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from core.clock import Clock
from core.errors import TransferError
from kvcache.arena import Arena, MappedArena, add
from kvcache.copiers import Copiers
from kvcache.orders import Load, Loaded, Piece
from kvcache.wire import Written
from transport.faultpoint import FaultPoint

TASK_BYTES = 1 << 20
"""What one thread copies at a time: a fifth of a millisecond."""


class _Job:
    """One load: tasks of a few blocks of one layer, in the order in which the forward pass needs them."""

    def __init__(self, load: Load, arena: MappedArena, num_layers: int, clock: Clock, faults: FaultPoint) -> None:
        self._load = load
        self._arena = arena
        self._clock = clock
        self._faults = faults
        self._begun_s = self._ended_s = clock.monotonic_s()
        self._waited_s = 0.0
        *streamed, self._last = load.pieces
        self._streamed: Sequence[Piece] = streamed
        layer_bytes = max(arena.part_bytes // num_layers, 1)
        self._blocks_of_task = max(TASK_BYTES // layer_bytes, 1)
        self._tasks_of_layer = -(-len(streamed) // self._blocks_of_task)
        self._summands = [[0] * len(streamed) for _ in range(num_layers)]
        self._change = threading.Condition()
        self._next_task = 0
        self._missing = [self._tasks_of_layer] * num_layers
        self._awaited: set[int] = set()
        self._last_is_sound = False
        self._why = ""

    def num_tasks(self) -> int:
        """Of all layers."""
        return self._tasks_of_layer * len(self._missing)

    def begin(self) -> None:
        """Loads the last block, of which this step writes the rest."""
        piece = self._last
        try:
            self._last_is_sound = self._arena.read_block(piece.block_id, piece.offset, piece.key, piece.digest)
        except TransferError as error:
            self._why = str(error)
        self._ended_s = self._clock.monotonic_s()
        self._waited_s = self._ended_s - self._begun_s

    def help(self) -> None:
        """Takes tasks until there are none."""
        self._work_off(len(self._missing) - 1)

    def wait_for(self, layer: int) -> None:
        """Every block of this layer is in place when it returns."""
        asked_s = self._clock.monotonic_s()
        self._work_off(layer)
        with self._change:
            self._change.wait_for(lambda: not any(self._missing[: layer + 1]))
        self._waited_s += self._clock.monotonic_s() - asked_s
        self._awaited.add(layer)

    def end(self) -> Loaded:
        """The forward pass is over: compares what has come."""
        was_awaited = len(self._awaited) == len(self._missing)
        self.wait_for(len(self._missing) - 1)
        why, bad = self._why, []
        if not was_awaited and not why:
            why = "the engine computed a layer without asking whether it had come"
        if not why:
            bad = self._bad()
        return self._load.ended(self._arena.part_bytes, self._ended_s - self._begun_s, why, bad, self._waited_s)

    def _bad(self) -> list[Written]:
        pieces = list(self._streamed)
        totals = [sum(summands) for summands in zip(*self._summands, strict=True)]
        bad = [
            piece
            for piece, total in zip(pieces, totals, strict=True)
            if not self._arena.is_sound(piece.offset, piece.digest, add(self._arena.first_summand(piece.key), total))
        ]
        if not self._last_is_sound:
            bad.append(self._last)
        return [Written(piece.key, piece.offset, piece.digest) for piece in bad]

    def _work_off(self, last_layer: int) -> None:
        """Takes tasks up to this layer's."""
        end_task = (last_layer + 1) * self._tasks_of_layer
        while True:
            with self._change:
                task = self._next_task
                if task >= end_task:
                    return
                self._next_task = task + 1
            layer, chunk = divmod(task, self._tasks_of_layer)
            try:
                if not self._why:
                    self._faults.reach("load", layer=layer, chunk=chunk)
                    self._copy(layer, chunk * self._blocks_of_task)
            except Exception as error:  # noqa: BLE001 - the engine waits for the task's end, whoever has it
                self._why = str(error) if isinstance(error, TransferError) else f"{type(error).__name__}: {error}"
            finally:
                with self._change:
                    self._missing[layer] -= 1
                    self._ended_s = self._clock.monotonic_s()
                    if not self._missing[layer]:
                        self._change.notify_all()

    def _copy(self, layer: int, first: int) -> None:
        summands, read = self._summands[layer], self._arena.read_layer
        for index, piece in enumerate(self._streamed[first : first + self._blocks_of_task], first):
            summands[index] = read(layer, piece.block_id, piece.offset)


class StepLoader:
    """The loads of one step at a time."""

    def __init__(self, arena: Arena, num_layers: int, copiers: Copiers, clock: Clock, faults: FaultPoint) -> None:
        self._arena = arena
        self._num_layers = num_layers
        self._copiers = copiers
        self._clock = clock
        self._faults = faults
        self._ordered: list[Load] = []
        self._jobs: list[_Job] = []

    def order(self, loads: Sequence[Load]) -> None:
        """This step's. None lasts longer than the step."""
        self._ordered, self._jobs = list(loads), []

    def begin(self) -> None:
        """Right before the forward pass, when nothing else writes into the engine's new blocks any more."""
        for load in self._ordered:
            arena = self._arena.get(load.arena_id)
            if arena is not None:
                self._jobs.append(_Job(load, arena, self._num_layers, self._clock, self._faults))
        for job in self._jobs:
            job.begin()
            for _ in range(min(self._copiers.num_threads - 1, job.num_tasks())):
                self._copiers.submit(job.help)

    def wait_for(self, layer: int) -> None:
        """Before this layer's attention."""
        for job in self._jobs:
            job.wait_for(layer)

    def end(self) -> list[Loaded]:
        """After the forward pass: an answer to every load of the step."""
        ended = [job.end() for job in self._jobs]
        begun = {loaded.request_id for loaded in ended}
        why = "the arena is not mapped here yet"
        ended += [load.ended(0, 0.0, why) for load in self._ordered if load.request_id not in begun]
        self._ordered, self._jobs = [], []
        return ended
