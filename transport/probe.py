"""Measures one endpoint, in both directions, between scratch regions: a few MB, bounded in time.

Memory model: see transport/scratch.py; what fits the processor's caches is measured warm.
Threading: waits, so it runs on a thread of its own; every call on the endpoint returns at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from core.clock import Clock
from core.errors import TransferError
from transport.base import Blocks, Endpoint, Transfer, TransferState
from transport.scratch import NUM_SCRATCH_BLOCKS, ROUND_BLOCKS, SCRATCH_BLOCK_BYTES, SCRATCH_REGION

PROBE_BUDGET_S = 0.09
"""For all schemes of one pair together, once they are connected."""

PATIENT_BUDGET_S = 1.0
"""For each scheme, where none has moved a round in time: a busy machine."""

READY_TIMEOUT_S = 12.0
"""Until the first block has arrived: connecting maps and populates the peer's memory over shm (0.3 s per GiB)."""

ROUND_BYTES = ROUND_BLOCKS * SCRATCH_BLOCK_BYTES
_ROUNDS = 3
_SPIN_S = 0.0003
_PAUSE_S = 0.0001
_NEAR = tuple(range(ROUND_BLOCKS))
_FAR = tuple(range(ROUND_BLOCKS, NUM_SCRATCH_BLOCKS))


class Measurement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fastest rounds. write_s and read_s: of ROUND_BYTES; latency_s: of writing one block. 0 where no round ended
    within the budget."""

    latency_s: float
    write_s: float
    read_s: float

    @property
    def write_gb_per_s(self) -> float:
        """Towards the peer."""
        return ROUND_BYTES / self.write_s / 1e9 if self.write_s else 0.0

    @property
    def read_gb_per_s(self) -> float:
        """From the peer."""
        return ROUND_BYTES / self.read_s / 1e9 if self.read_s else 0.0


def wait_ready(endpoint: Endpoint, tag: str, clock: Clock, timeout_s: float = READY_TIMEOUT_S) -> None:
    """Until one block has arrived. Raises TransferError with the reason if it does not."""
    transfer = endpoint.write(tag, Blocks(SCRATCH_REGION, _NEAR[:1]), Blocks(SCRATCH_REGION, _FAR[:1]))
    if not _wait(transfer, clock, clock.monotonic_s() + timeout_s):
        transfer.cancel()
        raise TransferError(f"nothing arrived within {timeout_s:.0f} s")


def measure(endpoint: Endpoint, tag: str, clock: Clock, budget_s: float) -> Measurement:
    """A connected endpoint's speed. Raises TransferError if a transfer fails."""
    near, far = Blocks(SCRATCH_REGION, _NEAR), Blocks(SCRATCH_REGION, _FAR)
    one_near, one_far = Blocks(SCRATCH_REGION, _NEAR[:1]), Blocks(SCRATCH_REGION, _FAR[:1])
    kinds: list[Callable[[], Transfer]] = [
        lambda: endpoint.write(tag, one_near, one_far),
        lambda: endpoint.write(tag, near, far),
        lambda: endpoint.read(near, far),
    ]
    ends_s, seconds = clock.monotonic_s() + budget_s, []
    for left, start in zip((3, 2, 1), kinds, strict=True):
        now_s = clock.monotonic_s()
        seconds.append(_fastest(start, clock, now_s + max(ends_s - now_s, 0.0) / left))
    return Measurement(*seconds)


def _fastest(start: Callable[[], Transfer], clock: Clock, until_s: float) -> float:
    """Of a few rounds; 0 if none ended in time."""
    best_s = 0.0
    for _ in range(_ROUNDS):
        begun_s = clock.monotonic_s()
        transfer = start()
        ended = _wait(transfer, clock, until_s)
        took_s = max(clock.monotonic_s() - begun_s, 1e-9)
        if not ended:
            transfer.cancel()
            break
        best_s = min(best_s or took_s, took_s)
        if begun_s + 2 * took_s > until_s:
            break
    return best_s


def _wait(transfer: Transfer, clock: Clock, until_s: float) -> bool:
    """Whether it was DONE in time. Raises TransferError if it FAILED."""
    spin_until_s = clock.monotonic_s() + _SPIN_S
    while (state := transfer.poll()) is TransferState.RUNNING:
        now_s = clock.monotonic_s()
        if now_s > until_s:
            return False
        time.sleep(0 if now_s < spin_until_s else _PAUSE_S)
    if state is TransferState.FAILED:
        raise TransferError(transfer.failure() or "a transfer failed")
    return True
