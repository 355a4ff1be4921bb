"""What `baton bench transfer` asks of everything that can move blocks: Baton's transports and its peers alike.

    receiving process                                     sending process
    Receiver.describe ───────────────────────────────────▶ Sender.connect
    Receiver.expect(job)                                   Sender.write(job, layers)    once, or layer by layer
    Receiver.receive: returns when all is in place         Sender.finish: returns when the local blocks are free again

Each mover_*.py has `sender(ground)` and `receiver(ground)`, and imports its library inside.

Memory model: all blocks lie in the two pools of a pair, which are mapped before anything here is made.
Threading: one thread per process calls these; a library may have threads of its own. Waiting: `Pause` sleeps a
fiftieth of the time waited so far, so it neither costs a core nor adds more than 2 % to a latency.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from benchmarks.kv_pool import Pool
from core.errors import TransferError

WAIT_S = 60.0
_PAUSE_SHARE = 0.02
_SHORTEST_PAUSE_S = 5e-6
_LONGEST_PAUSE_S = 1e-3
_PR_SET_TIMERSLACK = 29


class Ground(msgspec.Struct, frozen=True):
    """What a mover stands on: the sending process's pool is the source, the receiving one's the target. `other` is the
    target in the sending process, for what needs no peer (memcpy)."""

    name: str
    pool: Pool
    other: Pool


class Job(msgspec.Struct, frozen=True):
    """One hand-off: these blocks of the first `num_layers` layers into those. num_writes: calls of Sender.write."""

    tag: str
    local_ids: tuple[int, ...]
    remote_ids: tuple[int, ...]
    num_layers: int
    num_writes: int = 1


class Sender(Protocol):
    """Raises TransferError where something cannot be moved."""

    def connect(self, description: bytes) -> None: ...

    def write(self, job: Job, layers: range, *, is_last: bool) -> None:
        """Starts moving the job's blocks of these layers."""
        ...

    def finish(self) -> bool:
        """Returns when nothing of the job reads local memory any more. True: and all of it has certainly arrived, so
        that the job's end is now and nobody else will tell."""
        ...

    def close(self) -> None: ...


class Receiver(Protocol):
    """Raises TransferError where something went wrong."""

    def describe(self) -> bytes: ...

    def expect(self, job: Job) -> None: ...

    def receive(self) -> None:
        """Returns when everything of the job is in place; at once where only the sender knows."""
        ...

    def close(self) -> None: ...


class Pause:
    """Waits for something by looking again and again."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._begun_s = time.monotonic()

    def rest(self) -> None:
        """Sleeps a little. Raises TransferError when it has taken too long."""
        waited_s = time.monotonic() - self._begun_s
        if waited_s > WAIT_S:
            raise TransferError(f"waited {WAIT_S:.0f} s in vain until {self._what}")
        time.sleep(min(max(waited_s * _PAUSE_SHARE, _SHORTEST_PAUSE_S), _LONGEST_PAUSE_S))


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Raises TransferError when it has taken too long."""
    pause = Pause(what)
    while not condition():
        pause.rest()


def sharpen_sleep() -> None:
    """A sleep of this process's first thread ends when it says: Linux adds 50 us unless told otherwise."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
