"""Large copies, shared between the thread that must see them done and threads that help.

    write, write ──▶ queue of pieces ──▶ helpers copy them, on other cores, without Python; the caller goes on
    notice       ──▶ finish: the caller takes part, and waits for what is under way

One core does not use up a memory's bandwidth, and the engine's thread has a layer to compute. The queue is compiled
(transport/native_loops.py), since a helper that needed the interpreter's lock for its next piece would begin only when
the engine's thread pauses.

Memory model: addresses are raw. A piece that was begun is copied whole; `cancel` and `drop` return when none of theirs
is being copied, so memory may be unmapped or given away then. Copies may overtake each other.
No wait here has a deadline but the end of a memcpy of this process: memory that is being written cannot be let go of.
Threading: `start`, `finish` and `drop` are called under the endpoint's lock; `Copy` may be used from any thread.
"""

from __future__ import annotations

import os
import threading
import time
from types import ModuleType

from transport import native
from transport.affinity import num_copying_threads, widen_affinity
from transport.base import TransferState
from transport.copying import CopyPlan
from transport.transfer import SettledTransfer

MIN_SHARED_BYTES = 128 << 10
"""A smaller copy is made at once: it takes little longer than handing it over."""

MOST_RUNNING = 64
"""Copies of an endpoint, before it looks which of them have ended."""


class Queue:
    """Pieces that wait to be copied, by anybody. A position counts pieces since the beginning."""

    def __init__(self, loops: ModuleType) -> None:
        self._loops = loops
        self._state, self._rows = loops.new_state(), loops.new_rows()

    def put(self, plan: CopyPlan, from_address: int, to_address: int) -> int | None:
        """The position behind the plan's pieces; None if there is no room now, or it is closed."""
        position = int(self._loops.put(self._state, self._rows, plan.table(), from_address, to_address))
        return None if position < 0 else position

    def done(self) -> int:
        """Everything before this position has been copied, or was struck out."""
        return int(self._loops.done(self._state))

    def finish(self, position: int) -> None:
        """Returns when everything before this position is copied; takes part."""
        self._loops.finish(self._state, self._rows, position)

    def strike(self, first: int, last: int) -> None:
        """Positions first .. last-1 are not copied if they were not begun; none is being copied when this returns."""
        self._loops.strike(self._state, self._rows, first, last)

    def serve(self) -> None:
        """Copies until the queue is closed."""
        self._loops.serve(self._state, self._rows)

    def close(self) -> None:
        """Nothing more is put; what is in it can be finished or struck out."""
        self._loops.close(self._state)

    def copied(self) -> tuple[int, int]:
        """Bytes by all threads so far, and the ns that they took."""
        return int(self._state[self._loops.NUM_BYTES]), int(self._state[self._loops.NUM_NS])


class Helpers:
    """The threads that help with all copies of one transport, and their queue."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._num_threads = num_copying_threads(os.cpu_count() or 1) - 1
        self._is_asked = False
        self.queue: Queue | None = None
        """None on one core, before they have started, and when closed."""

    def start(self) -> None:
        """Starts them as soon as the loops are compiled, unless somebody has. Takes some milliseconds: not for the
        engine's thread."""
        with self._lock:
            if self._is_asked:
                return
            self._is_asked = True
        native.when_compiled(self._start)

    def close(self) -> None:
        """Ends them after what each is copying."""
        with self._lock:
            self._num_threads = 0
            queue, self.queue = self.queue, None
            if queue is not None:
                queue.close()
            for thread in self._threads:
                thread.join()
            self._threads.clear()

    def _start(self) -> None:
        loops = native.compiled()
        with self._lock:
            if loops is None or self._threads or not self._num_threads:
                return
            queue = Queue(loops)
            for number in range(self._num_threads):
                thread = threading.Thread(target=_help, args=(queue,), name=f"baton-copy-{number}", daemon=True)
                thread.start()
                self._threads.append(thread)
            self.queue = queue


def _help(queue: Queue) -> None:
    widen_affinity()
    queue.serve()


class Copy:
    """A shared copy, as a Transfer (transport/base.py). copy_s: seconds that copying took, by any thread: its bytes at
    the speed of all that was copied between its start and the moment when it was seen to be done."""

    __slots__ = ("_copied", "_first", "_last", "_lock", "_num_bytes", "_queue", "_state", "_why_failed", "copy_s")

    def __init__(self, queue: Queue, lock: threading.Lock, plan: CopyPlan, last: int, copied: tuple[int, int]) -> None:
        """last: the position behind its pieces. copied: by the queue before they were put. lock: its state is changed
        under it."""
        self._queue = queue
        self._lock = lock
        self._first, self._last = last - plan.num_pieces, last
        self._num_bytes = plan.num_bytes
        self._copied = copied
        self._state = TransferState.RUNNING
        self._why_failed = ""
        self.copy_s = 0.0

    def poll(self) -> TransferState:
        with self._lock:
            if self._state is TransferState.RUNNING and self._queue.done() >= self._last:
                num_bytes, num_ns = (now - then for now, then in zip(self._queue.copied(), self._copied, strict=True))
                self.copy_s = self._num_bytes * num_ns / num_bytes / 1e9
                self._state = TransferState.DONE
            return self._state

    def cancel(self) -> None:
        self.end("cancelled")

    def failure(self) -> str:
        return self._why_failed

    def finish(self) -> None:
        """Returns when it is copied, and whatever was put before it."""
        self._queue.finish(self._last)

    def end(self, why: str) -> None:
        """FAILED unless it is DONE; nothing of it is being copied when this returns."""
        with self._lock:
            if self._state is TransferState.RUNNING:
                self._state, self._why_failed = TransferState.FAILED, why
        self._queue.strike(self._first, self._last)


class SharedCopies:
    """The copies of one endpoint."""

    def __init__(self, helpers: Helpers) -> None:
        self._helpers = helpers
        self._lock = threading.Lock()
        self._running: list[Copy] = []

    def start(self, plan: CopyPlan, from_address: int, to_address: int) -> Copy | SettledTransfer:
        """Carries out a plan: now, if it is small or the queue is full; otherwise `finish` waits for it."""
        queue = self._helpers.queue
        if plan.num_bytes >= MIN_SHARED_BYTES and queue is not None:
            copied = queue.copied()
            position = queue.put(plan, from_address, to_address)
            if position is not None:
                copy = Copy(queue, self._lock, plan, position, copied)
                self._forget_ended()
                self._running.append(copy)
                return copy
        begun_s = time.perf_counter()
        plan.carry_out(from_address, to_address)
        return SettledTransfer(copy_s=time.perf_counter() - begun_s)

    def finish(self) -> None:
        """Everything that was started is copied when this returns."""
        if self._running:
            self._running[-1].finish()
            self._running.clear()

    def drop(self, why: str) -> None:
        """Ends everything that was started."""
        for copy in self._running:
            copy.end(why)
        self._running.clear()

    def _forget_ended(self) -> None:
        """Where nobody sends a notice for long."""
        if len(self._running) >= MOST_RUNNING:
            self._running = [copy for copy in self._running if copy.poll() is TransferState.RUNNING]
