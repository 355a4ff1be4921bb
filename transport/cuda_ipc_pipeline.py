"""Writes and reads of one connector on their way: waiting, in flight on the device, ended.

    add ──▶ waiting ── Opening(tag) once, lane.copy ──▶ flying ── moment passed, Finished(tag, notice) ──▶ DONE
               └──────────── cancel, end ─────────────────┴───────── moment passed ─────────────────────▶ FAILED

A copy that was given to the device cannot be taken back: whatever happens, its transfer is RUNNING until its moment has
passed, so that whoever waits for that may give the memory away on both sides.
Memory model: bounded; MAX_FLYING copies on the device, MAX_WAITING behind them.
Threading: none of its own; everything here is called under the endpoint's lock and never waits.
"""

from __future__ import annotations

import collections
from collections.abc import Callable

from core.errors import TransferError
from transport.base import TransferState
from transport.cuda_ipc_link import CudaIpcLink
from transport.device import Moment
from transport.order import Order
from transport.shm_wire import Finished

MAX_FLYING = 1024
MAX_WAITING = 1 << 16


class CudaIpcTransfer:
    """One order. Its state is changed by its pipeline alone."""

    copy_s = 0.0

    def __init__(self, order: Order, after: Moment, advance: Callable[[], None]) -> None:
        self.order = order
        self.moment = after
        """What it waits for: first that its source is computed, in flight that its copy is done."""
        self.state = TransferState.RUNNING
        self.why_failed = ""
        self.is_cancelled = False
        self._advance = advance

    def poll(self) -> TransferState:
        if self.state is TransferState.RUNNING:
            self._advance()
        return self.state

    def cancel(self) -> None:
        """Ends it without a notice; at once unless the device has it already."""
        self.is_cancelled = True
        self._advance()

    def failure(self) -> str:
        return self.why_failed

    def finish(self, why_failed: str = "") -> None:
        """DONE, or FAILED with a reason."""
        self.moment.release()
        self.why_failed = why_failed
        self.state = TransferState.FAILED if why_failed else TransferState.DONE


class Pipeline:
    """See the drawing. `why_ended`: nothing new is taken any more; what flies still has to land."""

    def __init__(self) -> None:
        self._waiting: collections.deque[CudaIpcTransfer] = collections.deque()
        self._flying: collections.deque[CudaIpcTransfer] = collections.deque()
        self.why_ended = ""

    def add(self, transfer: CudaIpcTransfer) -> None:
        """Raises TransferError if too many wait: the device or the owner takes nothing."""
        if self.why_ended:
            transfer.finish(self.why_ended)
            return
        if len(self._waiting) >= MAX_WAITING:
            transfer.finish("too many copies wait")
            raise TransferError(f"{MAX_WAITING} copies wait for the GPU or for the peer already")
        self._waiting.append(transfer)

    def advance(self, link: CudaIpcLink | None) -> None:
        """Moves everything on as far as it goes without waiting. Raises TransferError if the owner is gone or the
        device refuses: then `end` it."""
        if any(each.is_cancelled for each in self._waiting):
            self._waiting = collections.deque(each for each in self._waiting if not _is_dropped(each))
        if link is None:
            return
        while self._flying and self._land(link, self._flying[0]):
            self._flying.popleft()
        while self._waiting and len(self._flying) < MAX_FLYING and self._launch(link, self._waiting[0]):
            self._flying.append(self._waiting.popleft())

    def end(self, why: str) -> None:
        """Nothing more is given to the device."""
        self.why_ended = self.why_ended or why
        for transfer in self._waiting:
            transfer.finish(self.why_ended)
        self._waiting.clear()

    def is_empty(self) -> bool:
        """Whether the device has nothing of ours, and nothing waits for it."""
        return not (self._waiting or self._flying)

    def has_news(self) -> bool:
        """Whether somebody besides the caller waits for what flies: the owner for a notice, everyone for the end."""
        return bool(self._waiting or self.why_ended) or any(each.order.notice is not None for each in self._flying)

    def _launch(self, link: CudaIpcLink, transfer: CudaIpcTransfer) -> bool:
        order = transfer.order.aimed(link.regions)
        if order.tag is not None and not link.owner.announce(order.tag):
            return False
        computed = transfer.moment
        transfer.moment = link.lane.copy(*order.source, *order.target, computed)
        computed.release()
        return True

    def _land(self, link: CudaIpcLink, transfer: CudaIpcTransfer) -> bool:
        try:
            if not transfer.moment.has_passed():
                return False
        except TransferError as error:  # the device failed, and with it everything that it still had
            self.end(str(error))
            transfer.finish(str(error))
            return True
        order = transfer.order
        if self.why_ended or transfer.is_cancelled:
            transfer.finish(self.why_ended or "cancelled")
            return True
        if (
            order.tag is not None
            and order.notice is not None
            and not link.owner.send(Finished(order.tag, order.notice))
        ):
            return False
        transfer.finish()
        return True


def _is_dropped(transfer: CudaIpcTransfer) -> bool:
    if transfer.is_cancelled:
        transfer.finish("cancelled")
    return transfer.is_cancelled
