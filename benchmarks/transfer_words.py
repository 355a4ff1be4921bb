"""What `baton bench transfer` and its processes say to each other: one line of JSON each, orders down, answers up.

receiver ── Ready(description) ──▶ measurer ── Connect ──▶ sender ── Ready ──▶ measurer                  once
measurer ── Expect ──▶ receiver ── Ready ──▶ measurer ── Send ──▶ sender ── Sent ──▶ measurer
                       receiver ── Landed ──▶ measurer
measurer ── Check ──▶ both ── Checked ──▶ measurer                            for some jobs: is it the same?
"""

from __future__ import annotations

import msgspec

from benchmarks.mover import Job


class _Word(msgspec.Struct, frozen=True, tag=True):
    """Base of all."""


class Connect(_Word, frozen=True):
    """To a sender: where its receiver is."""

    description: bytes


class Expect(_Word, frozen=True):
    """To a receiver. is_cleared: empty the blocks before."""

    job: Job
    is_cleared: bool = False


class Send(_Word, frozen=True):
    """To a sender. layer_s: how long a layer is computed before it can be written, where there is a write per layer."""

    job: Job
    layer_s: float = 0.0


class Check(_Word, frozen=True):
    """To both: digest these blocks of the first `num_layers` layers."""

    ids: tuple[int, ...]
    num_layers: int


class Stop(_Word, frozen=True):
    """To both: leave."""


class Ready(_Word, frozen=True):
    """Started, connected, or expecting."""

    description: bytes = b""


class Sent(_Word, frozen=True):
    """begun_s: when everything to be written was there (with layers: when the last one was). held_s: inside the calls
    of write. landed_s: when it was in place, 0 where only the receiver knows. All on the host's monotonic clock."""

    begun_s: float
    held_s: float
    cpu_s: float
    landed_s: float = 0.0


class Landed(_Word, frozen=True):
    """When everything was in place, as the receiver saw it."""

    landed_s: float
    cpu_s: float


class Checked(_Word, frozen=True):
    """Over every byte."""

    digest: int


class Failed(_Word, frozen=True):
    """What went wrong; the process ends."""

    why: str


Order = Connect | Expect | Send | Check | Stop
Answer = Ready | Sent | Landed | Checked | Failed

ORDERS = msgspec.json.Decoder(Order)
ANSWERS = msgspec.json.Decoder(Answer)


def line(word: Order | Answer) -> bytes:
    """As it travels."""
    return msgspec.json.encode(word) + b"\n"
