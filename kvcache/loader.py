"""The loading worker: fills blocks of waiting requests from the arena, on a thread of its own.

A request whose blocks are being loaded is not scheduled, so the engine goes on with others; a block counts only after
its digest was compared in the engine's own memory. What differs is reported, and the engine computes the prompt.

Memory and threads: the engine keeps a request's blocks until its load was reported, also if its client is gone, so
the thread always writes into blocks that are its own. One thread; the loads of one engine run one after another.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import Counter

from core.clock import Clock
from core.errors import TransferError
from kvcache.arena import Arena
from kvcache.orders import Load, Loaded
from kvcache.wire import Written
from transport.faultpoint import FaultPoint

CLOSE_TIMEOUT_S = 5.0


class Loader:
    """All loads of one worker; it also maps the arena, since that may take a moment."""

    def __init__(self, arena: Arena, clock: Clock, faults: FaultPoint) -> None:
        self._arena = arena
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
            else:
                with contextlib.suppress(TransferError):
                    self._arena.map(job)

    def _load(self, load: Load) -> Loaded:
        begun_s = self._clock.monotonic_s()
        bad, why, num_bytes = [], "", 0
        try:
            arena = self._arena.map(load.arena_id)
            num_bytes = len(load.pieces) * arena.part_bytes
            for index, piece in enumerate(load.pieces):
                self._faults.reach("load", chunk=index)
                if not arena.read_block(piece.block_id, piece.offset, piece.key, piece.digest):
                    bad.append(Written(piece.key, piece.offset, piece.digest))
                    break
        except TransferError as error:
            why = str(error)
        except Exception as error:  # noqa: BLE001 - the thread must survive: a request waits for its answer
            why = f"{type(error).__name__}: {error}"
        if bad:
            why = "a block in the cache differs from what was stored"
        seconds = self._clock.monotonic_s() - begun_s
        tiers = Counter(piece.tier for piece in load.pieces)
        tokens = {tier: sum(piece.num_tokens for piece in load.pieces if piece.tier == tier) for tier in tiers}
        return Loaded(load.request_id, len(load.pieces), num_bytes, seconds, why, bad, dict(tiers), tokens)
