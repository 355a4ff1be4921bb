"""Large copies, shared between the thread that must see them done and threads that help.

    write, write ──▶ collected ──▶ jobs of a megabyte ──▶ helpers take them, on other cores; the caller goes on
    notice       ──▶ finish: the caller takes what no helper has, and waits for what is under way

One core does not use up a memory's bandwidth, and the engine's thread has a layer to compute.

Memory model: addresses are raw. A job that was begun is copied whole; `cancel` and `drop` return when none of theirs is
being copied, so memory may be unmapped or given away then. Copies may overtake each other.
No wait here has a deadline but the end of a memcpy of this process: memory that is being written cannot be let go of.
Threading: `start`, `finish` and `drop` are called under the endpoint's lock; `Copy` may be used from any thread, and is
changed under the lock of its `SharedCopies`.
"""

from __future__ import annotations

import collections
import os
import queue
import threading
import time

from core.errors import TransferError
from transport.affinity import num_copying_threads, widen_affinity
from transport.base import TransferState
from transport.copying import SHARE_BYTES, CopyPlan, Share
from transport.native import copy_pieces
from transport.transfer import SettledTransfer

MIN_SHARED_BYTES = 128 << 10
"""A smaller copy is made at once: it takes little longer than handing it over."""


class Copy:
    """A shared copy, as a Transfer (transport/base.py). copy_s: seconds that all threads together spent copying."""

    __slots__ = ("_copies", "copy_s", "num_left", "state", "why_failed")

    def __init__(self, copies: SharedCopies, num_parts: int) -> None:
        self._copies = copies
        self.num_left = num_parts
        self.copy_s = 0.0
        self.state = TransferState.RUNNING
        self.why_failed = ""

    def poll(self) -> TransferState:
        if self.state is TransferState.RUNNING:
            self._copies.share_out()
        return self.state

    def cancel(self) -> None:
        self._copies.end({self}, "cancelled")

    def failure(self) -> str:
        return self.why_failed

    def fail(self, why: str) -> None:
        """Ends it unless it has ended."""
        if self.state is TransferState.RUNNING:
            self.state, self.why_failed = TransferState.FAILED, why


class Helpers:
    """The threads that help with all copies of one transport."""

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[SharedCopies | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._num_threads = num_copying_threads(os.cpu_count() or 1) - 1

    @property
    def can_help(self) -> bool:
        """False on one core, before they have started, and when closed."""
        return bool(self._threads)

    def start(self) -> None:
        """Starts them, unless somebody has. Takes some milliseconds: not for the engine's thread."""
        with self._lock:
            for number in range(len(self._threads), self._num_threads):
                thread = threading.Thread(target=self._run, name=f"baton-copy-{number}", daemon=True)
                thread.start()
                self._threads.append(thread)

    def ask(self, copies: SharedCopies) -> None:
        """A job of these copies waits."""
        self._asked.put(copies)

    def close(self) -> None:
        """Ends them after what each is copying."""
        with self._lock:
            self._num_threads = 0
            threads, self._threads = self._threads, []
        for _ in threads:
            self._asked.put(None)
        for thread in threads:
            thread.join()

    def _run(self) -> None:
        widen_affinity()
        while (copies := self._asked.get()) is not None:
            copies.help()


class SharedCopies:
    """The copies of one endpoint."""

    def __init__(self, helpers: Helpers) -> None:
        self._helpers = helpers
        self._lock = threading.Lock()
        self._rested = threading.Condition(self._lock)
        self._collected: _Job | None = None
        self._waiting: collections.deque[_Job] = collections.deque()
        self._under_way: list[_Job] = []
        self._why_failed = ""

    def start(self, plan: CopyPlan, from_address: int, to_address: int) -> Copy | SettledTransfer:
        """Carries out a plan: now, if it is small; otherwise it is copied after `finish`, or before."""
        if plan.num_bytes < MIN_SHARED_BYTES or not self._helpers.can_help or copy_pieces() is None:
            begun_s = time.perf_counter()
            plan.carry_out(from_address, to_address)
            return SettledTransfer(copy_s=time.perf_counter() - begun_s)
        copy = Copy(self, len(plan.shares))
        for share in plan.shares:
            with self._lock:
                job = self._collected
                if job is None or job.share is not share:
                    self._share_out()
                    job = self._collected = _Job(plan, share)
                job.copies.append(copy)
                job.addresses.append((from_address, to_address))
                if len(job.copies) * share.num_bytes >= SHARE_BYTES:
                    self._share_out()
        return copy

    def share_out(self) -> None:
        """Whatever was collected need not wait for more."""
        with self._lock:
            self._share_out()

    def help(self) -> bool:
        """Carries out the job that waits longest. False: none waits."""
        with self._lock:
            if not self._waiting:
                return False
            job = self._waiting.popleft()
            self._under_way.append(job)
        begun_s, why_failed = time.perf_counter(), ""
        try:
            job.carry_out()
        except Exception as error:  # noqa: BLE001 - a helper must survive, and nobody may wait for ever
            why_failed = f"a copy failed: {type(error).__name__}: {error}"
        copy_s = time.perf_counter() - begun_s
        with self._lock:
            self._under_way.remove(job)
            self._why_failed = self._why_failed or why_failed
            job.settle(copy_s, why_failed)
            self._rested.notify_all()
        return True

    def finish(self) -> None:
        """Everything that was started is copied when this returns. Raises TransferError if something could not be."""
        self.share_out()
        while self.help():
            pass
        with self._lock:
            self._rested.wait_for(lambda: not self._under_way)
            if self._why_failed:
                raise TransferError(self._why_failed)

    def drop(self, why: str) -> None:
        """Ends everything that was started."""
        with self._lock:
            copies = {copy for job in (*self._not_begun(), *self._under_way) for copy in job.copies}
        self.end(copies, why)

    def end(self, copies: set[Copy], why: str) -> None:
        """Ends these FAILED unless they are DONE; none of them is being copied when this returns."""
        with self._lock:
            for copy in copies:
                copy.fail(why)
            for job in self._not_begun():
                job.remove(copies)
            self._rested.wait_for(lambda: all(copies.isdisjoint(job.copies) for job in self._under_way))

    def _not_begun(self) -> list[_Job]:
        return [*self._waiting, *([] if self._collected is None else [self._collected])]

    def _share_out(self) -> None:
        """Under the lock."""
        if self._collected is not None:
            self._waiting.append(self._collected)
            self._collected = None
            self._helpers.ask(self)


class _Job:
    """What one thread copies in one call: a share of a plan, for each of some copies."""

    def __init__(self, plan: CopyPlan, share: Share) -> None:
        self.share = share
        self.copies: list[Copy] = []
        self.addresses: list[tuple[int, int]] = []
        self._plan = plan

    def carry_out(self) -> None:
        if self.addresses:
            self._plan.carry_out_compiled(self.share.first, self.share.last, self.addresses)

    def settle(self, copy_s: float, why_failed: str) -> None:
        """It was carried out in so many seconds, or could not be."""
        for copy in self.copies:
            copy.copy_s += copy_s / len(self.copies)
            copy.num_left -= 1
            if why_failed:
                copy.fail(why_failed)
            elif not copy.num_left and copy.state is TransferState.RUNNING:
                copy.state = TransferState.DONE

    def remove(self, copies: set[Copy]) -> None:
        """Of a job that was not begun."""
        left = [each for each in zip(self.copies, self.addresses, strict=True) if each[0] not in copies]
        self.copies, self.addresses = [copy for copy, _ in left], [pair for _, pair in left]
