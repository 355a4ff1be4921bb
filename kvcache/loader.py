"""The loading worker: fills blocks of waiting requests from the arena, on threads of its own.

A request whose blocks are being loaded here is not scheduled, so the engine goes on with others; where there are none
the load is part of a step (kvcache/step_loader.py). A block counts only after its digest was compared in the engine's
own memory. What differs is reported, and the engine computes the prompt.

Memory and threads: the engine keeps a request's blocks until its load was reported, also if its client is gone, so
whoever copies (kvcache/copies.py) always writes into blocks that are its own. The loads of one engine run one after
another.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable

from core.clock import Clock
from core.errors import TransferError
from kvcache.arena import Arena
from kvcache.copies import Reads
from kvcache.orders import Load, Loaded
from kvcache.wire import Written
from transport.device import Moment

CLOSE_TIMEOUT_S = 5.0


class Loader:
    """All loads of one worker; it also maps the arena, since that may take a moment."""

    def __init__(self, arena: Arena, reads: Reads, clock: Clock, on_end: Callable[[], None] = lambda: None) -> None:
        """on_end: called on the loading thread when a load has ended and can be had by `ended`."""
        self._arena = arena
        self._reads = reads
        self._on_end = on_end
        self._clock = clock
        self._waiting: queue.SimpleQueue[tuple[Load, Moment | None] | str | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[Loaded] = queue.SimpleQueue()
        self._num_running = 0
        self._thread = threading.Thread(target=self._run, name="baton-cache-load", daemon=True)
        self._thread.start()

    def start(self, load: Load) -> None:
        """Begins one load; `ended` tells of its end."""
        self._num_running += 1
        try:
            self._waiting.put((load, self._reads.mark()))
        except TransferError as error:
            self._ended.put(load.ended(0, 0.0, str(error)))

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
            if isinstance(job, str):
                with contextlib.suppress(TransferError):
                    self._arena.map(job)
            else:
                self._ended.put(self._load(*job))
                self._on_end()

    def _load(self, load: Load, ordered: Moment | None) -> Loaded:
        begun_s = self._clock.monotonic_s()
        bad: list[Written] = []
        why, part_bytes = "", 0
        try:
            arena = self._arena.map(load.arena_id)
            part_bytes = arena.part_bytes
            bad = self._reads.read_all(arena, load.pieces, ordered)
        except TransferError as error:
            why = str(error)
        except Exception as error:  # noqa: BLE001 - the thread must survive: a request waits for its answer
            why = f"{type(error).__name__}: {error}"
        finally:
            if ordered is not None:
                ordered.release()
        return load.ended(part_bytes, self._clock.monotonic_s() - begun_s, why, bad)
