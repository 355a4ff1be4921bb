"""One system's processes, as the measurer sees them: a sender and a receiver, asleep while others are measured.

    start ──▶ [SIGSTOP] ─┬─ awake: SIGCONT ──▶ move(job) ... ──▶ SIGSTOP ─┐ ──▶ close
                         └────────────────────────────────────────────────┘

A stopped process uses no core, which matters: some peers' threads spin for ever, also when there is nothing to do.

Threading: the caller's. Every wait has a deadline; a process that says nothing is killed, and the system has failed.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, TypeVar

import msgspec

from benchmarks.kv_pool import PoolShape
from benchmarks.mover import WAIT_S, Job
from benchmarks.transfer_end import Place
from benchmarks.transfer_systems import System, environment_of
from benchmarks.transfer_words import (
    ANSWERS,
    Answer,
    Check,
    Checked,
    Connect,
    Expect,
    Failed,
    Landed,
    Order,
    Ready,
    Send,
    Sent,
    Stop,
    line,
)
from core.errors import TransferError

_LAST_WORDS_BYTES = 2000
_WAIT_S = 1.5 * WAIT_S

T = TypeVar("T", bound=Answer)


class Moved(msgspec.Struct, frozen=True):
    """One job: seconds on the host's monotonic clock; CPU of both processes together."""

    begun_s: float
    landed_s: float
    held_s: float
    cpu_s: float

    @property
    def latency_s(self) -> float:
        return self.landed_s - self.begun_s


class Process:
    """One end."""

    def __init__(self, system: System, place: Place) -> None:
        self._what = f"{system.name}'s {'sender' if place.is_sender else 'receiver'}"
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        self._buffer = b""
        self.deadline_s = float("inf")
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "benchmarks.transfer_end", msgspec.json.encode(place).decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            pass_fds=(place.source_fd, place.target_fd),
            env=environment_of(system),
        )

    def tell(self, order: Order) -> None:
        """Raises TransferError if it has ended."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(line(order))
            self._child.stdin.flush()
        except OSError as error:
            raise TransferError(f"{self._what} has ended: {self._last_words()}") from error

    def hear(self, kind: type[T]) -> T:
        """Its next answer. Raises TransferError if it failed, ended, or says nothing for too long, or until its
        deadline, if it has one."""
        deadline_s = min(time.monotonic() + _WAIT_S, self.deadline_s)
        while b"\n" not in self._buffer:
            self._read(deadline_s)
        words, _, self._buffer = self._buffer.partition(b"\n")
        answer: Answer = ANSWERS.decode(words)
        if isinstance(answer, Failed):
            raise TransferError(f"{self._what}: {answer.why}")
        if not isinstance(answer, kind):
            raise TransferError(f"{self._what} said {answer}")
        return answer

    def signal(self, number: signal.Signals) -> None:
        """Does nothing if it has ended."""
        with suppress(ProcessLookupError):
            self._child.send_signal(number)

    def ask_to_leave(self) -> None:
        """Does not wait. May be called again."""
        if not self._errors.closed:
            self.signal(signal.SIGCONT)
            with suppress(TransferError):
                self.tell(Stop())

    def close(self) -> None:
        """Ends it, at once if it does not leave by itself. May be called again."""
        if self._errors.closed:
            return
        self.ask_to_leave()
        try:
            self._child.wait(2.0)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        for stream in (self._child.stdin, self._child.stdout, self._errors):
            if stream is not None:
                with suppress(OSError):
                    stream.close()

    def _read(self, deadline_s: float) -> None:
        assert self._child.stdout is not None
        readable, _, _ = select.select([self._child.stdout], [], [], max(deadline_s - time.monotonic(), 0.0))
        if not readable:
            raise TransferError(f"{self._what} says nothing in time: {self._last_words()}")
        more = os.read(self._child.stdout.fileno(), 1 << 16)
        if not more:
            raise TransferError(f"{self._what} has ended: {self._last_words()}")
        self._buffer += more

    def _last_words(self) -> str:
        self._errors.seek(max(self._errors.seek(0, os.SEEK_END) - _LAST_WORDS_BYTES, 0))
        return self._errors.read().decode(errors="replace").strip() or "it left no words"


class Pair:
    """A sender and a receiver. `connect` before the first job."""

    def __init__(self, system: System, shape: PoolShape, source_fd: int, target_fd: int) -> None:
        fds = source_fd, target_fd
        self.sender, self.receiver = (
            Process(system, Place(os.getpid(), is_sender, system.name, shape, *fds)) for is_sender in (True, False)
        )

    def connect(self, patience_s: float = _WAIT_S) -> None:
        """Waits for both to be ready, moves a piece, since some connect only then, within a deadline of their own, and
        puts them to sleep."""
        for process in (self.sender, self.receiver):
            process.deadline_s = time.monotonic() + patience_s
        description = self.receiver.hear(Ready).description
        self.sender.hear(Ready)
        self.sender.tell(Connect(description))
        self.sender.hear(Ready)
        move([self], [Job("hello", (0,), (0,), 1)], 0.0)
        for process in (self.sender, self.receiver):
            process.deadline_s = float("inf")
        self.signal(signal.SIGSTOP)

    def check(self, job: Job) -> None:
        """Moves a job whose blocks were emptied before. Raises TransferError unless all of it arrived."""
        move([self], [job], 0.0, is_cleared=True)
        self.sender.tell(Check(job.local_ids, job.num_layers))
        self.receiver.tell(Check(job.remote_ids, job.num_layers))
        if self.sender.hear(Checked) != self.receiver.hear(Checked):
            raise TransferError("what arrived is not what was sent")

    def signal(self, number: signal.Signals) -> None:
        self.sender.signal(number)
        self.receiver.signal(number)

    def close(self) -> None:
        close_all([self])


def close_all(pairs: Sequence[Pair]) -> None:
    """Ends them together: each takes a while to leave."""
    processes = [process for pair in pairs for process in (pair.sender, pair.receiver)]
    for process in processes:
        process.ask_to_leave()
    for process in processes:
        process.close()


@contextmanager
def awake(pairs: Sequence[Pair]) -> Iterator[None]:
    """Inside, these processes run."""
    for pair in pairs:
        pair.signal(signal.SIGCONT)
    try:
        yield
    finally:
        for pair in pairs:
            pair.signal(signal.SIGSTOP)


def move(pairs: Sequence[Pair], jobs: Sequence[Job], layer_s: float, *, is_cleared: bool = False) -> list[Moved]:
    """One job per pair, all at the same time. Raises TransferError."""
    for pair, job in zip(pairs, jobs, strict=True):
        pair.receiver.tell(Expect(job, is_cleared))
    for pair in pairs:
        pair.receiver.hear(Ready)
    for pair, job in zip(pairs, jobs, strict=True):
        pair.sender.tell(Send(job, layer_s))
    moved = []
    for pair in pairs:
        sent, landed = pair.sender.hear(Sent), pair.receiver.hear(Landed)
        at_s = sent.landed_s or landed.landed_s
        moved.append(Moved(sent.begun_s, at_s, sent.held_s, sent.cpu_s + landed.cpu_s))
    return moved
