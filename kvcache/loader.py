"""The loading worker: fills blocks of waiting requests from the arena, on threads of its own.

A request whose blocks are being loaded here is not scheduled, so the engine goes on with others; where there are none
the load is part of a step (kvcache/step_loader.py). A block counts only after its digest was compared in the engine's
own memory. What differs is reported, and the engine computes the prompt.

Memory and threads: the engine keeps a request's blocks until its load was reported, also if its client is gone, so
the threads always write into blocks that are their own. The loads of one engine run one after another; the blocks of a
large one are shared out among a few threads, since one core does not use up a memory's bandwidth.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait

from core.clock import Clock
from core.errors import TransferError
from kvcache.arena import Arena, MappedArena
from kvcache.copiers import Copiers
from kvcache.orders import Load, Loaded, Piece
from kvcache.wire import Written
from transport.faultpoint import FaultPoint

CLOSE_TIMEOUT_S = 5.0
MIN_SHARED_BYTES = 8 << 20
"""A smaller load is over before another thread is awake."""


class Loader:
    """All loads of one worker; it also maps the arena, since that may take a moment."""

    def __init__(
        self,
        arena: Arena,
        copiers: Copiers,
        clock: Clock,
        faults: FaultPoint,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        """on_end: called on the loading thread when a load has ended and can be had by `ended`."""
        self._arena = arena
        self._copiers = copiers
        self._on_end = on_end
        self._clock = clock
        self._faults = faults
        self._waiting: queue.SimpleQueue[Load | str | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[Loaded] = queue.SimpleQueue()
        self._num_running = 0
        self._thread = threading.Thread(target=self._run, name="baton-cache-load", daemon=True)
        self._thread.start()

    def start(self, load: Load) -> None:
        """Begins one load; `ended` tells of its end."""
        self._num_running += 1
        self._waiting.put(load)

    def prepare(self, arena_id: str) -> None:
        """Maps an arena for somebody who cannot wait for it."""
        self._waiting.put(arena_id)

    def ended(self, wait_s: float = 0.0) -> list[Loaded]:
        """What has ended since the last call; with loads under way waits for the first end, but not longer."""
        result = []
        if wait_s and self._num_running:
            with contextlib.suppress(queue.Empty):
                result.append(self._ended.get(timeout=wait_s))
        while not self._ended.empty():
            result.append(self._ended.get())
        self._num_running -= len(result)
        return result

    def num_running(self) -> int:
        """Loads whose end was not reported yet."""
        return self._num_running

    def close(self) -> None:
        """Ends the thread after the load that is under way."""
        self._waiting.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while (job := self._waiting.get()) is not None:
            if isinstance(job, Load):
                self._ended.put(self._load(job))
                self._on_end()
            else:
                with contextlib.suppress(TransferError):
                    self._arena.map(job)

    def _load(self, load: Load) -> Loaded:
        begun_s = self._clock.monotonic_s()
        bad: list[Written] = []
        why, part_bytes = "", 0
        try:
            arena = self._arena.map(load.arena_id)
            part_bytes = arena.part_bytes
            bad = self._read_all(arena, load.pieces)
        except TransferError as error:
            why = str(error)
        except Exception as error:  # noqa: BLE001 - the thread must survive: a request waits for its answer
            why = f"{type(error).__name__}: {error}"
        return load.ended(part_bytes, self._clock.monotonic_s() - begun_s, why, bad)

    def _read_all(self, arena: MappedArena, pieces: Sequence[Piece]) -> list[Written]:
        """Reads every block; returns those that differ. Every thread has ended then, also where one raises."""
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

    def _read(self, arena: MappedArena, pieces: Sequence[Piece], first: int, step: int) -> list[Written]:
        """Every `step`-th block from `first` on, as far as the first that differs."""
        for index in range(first, len(pieces), step):
            piece = pieces[index]
            self._faults.reach("load", chunk=index)
            if not arena.read_block(piece.block_id, piece.offset, piece.key, piece.digest):
                return [Written(piece.key, piece.offset, piece.digest)]
        return []
