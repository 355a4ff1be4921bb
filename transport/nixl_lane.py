"""What one peer is being sent under one tag: transfers in order, and each notice behind all data before it.

    WAITING ──▶ COPYING ──▶ COPIED ──▶ NOTIFIED ──▶ over         without a notice: COPYING ──▶ over
       no grant yet            until everything earlier is over       until the owner has heard it

Copies of one lane overlap; a notice is sent when its own copy and everything earlier under the tag is over, one at a
time (NIXL promises no order between notifications).
Memory model: a posted copy keeps reading our blocks until NIXL says that it is over; a cancelled one does so too, and
only then ends.
Threading: the transport's thread; other threads read `state` and set `is_cancelled`.
"""

from __future__ import annotations

import collections
import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from transport.base import TransferState
from transport.nixl_agent import NixlAgent, NixlPeer, Posting
from transport.nixl_wire import Notice, encode_notice
from transport.regions import Span

MAX_POSTED = 64


@dataclass(frozen=True)
class Copy:
    """What one transfer does. No tag: a read."""

    local: Span
    local_ids: tuple[int, ...]
    remote: Span
    remote_ids: tuple[int, ...]
    tag: str | None = None
    notice: bytes | None = None


class _Stage(enum.Enum):
    WAITING = "waiting"
    COPYING = "copying"
    COPIED = "copied"
    NOTIFIED = "notified"
    OVER = "over"


class NixlTransfer:
    """See transport/base.py. `wake`: has the thread look at a cancellation."""

    copy_s = 0.0

    def __init__(self, copy: Copy, wake: Callable[[], None]) -> None:
        self.copy = copy
        self.stage = _Stage.WAITING
        self.posting: Posting | None = None
        self.is_cancelled = False
        self._state = TransferState.RUNNING
        self._why_failed = ""
        self._wake = wake

    def poll(self) -> TransferState:
        return self._state

    def cancel(self) -> None:
        if self._state is TransferState.RUNNING:
            self.is_cancelled = True
            self._wake()

    def failure(self) -> str:
        return self._why_failed

    def finish(self, why_failed: str = "") -> None:
        """Ends it."""
        self.stage = _Stage.OVER
        self._why_failed = why_failed
        self._state = TransferState.FAILED if why_failed else TransferState.DONE


class Lane:
    """One tag's transfers to one peer; without a tag, reads, which need no grant. link: the connection's name; numbers:
    of its notices."""

    def __init__(self, tag: str | None, link: str, numbers: Iterator[int]) -> None:
        self.tag = tag
        self._link = link
        self._numbers = numbers
        self.is_granted = tag is None
        self.is_asked = False
        self.why_shut = ""
        self._queue: collections.deque[NixlTransfer] = collections.deque()
        self._number = 0

    def add(self, transfer: NixlTransfer) -> None:
        """Behind what is there; fails at once where the lane is shut."""
        if self.why_shut:
            transfer.finish(self.why_shut)
        else:
            self._queue.append(transfer)

    def is_idle(self) -> bool:
        return not self._queue

    def is_moving(self) -> bool:
        """Whether the peer's progress is needed."""
        return any(each.stage in (_Stage.COPYING, _Stage.NOTIFIED) for each in self._queue)

    def has_work(self) -> bool:
        """Whether something would be posted now."""
        return self.is_granted and any(each.stage is _Stage.WAITING for each in self._queue)

    def shut(self, why: str) -> None:
        """Nothing new is posted, no notice is sent; what is being copied goes on to its end."""
        self.why_shut = self.why_shut or why
        for transfer in self._queue:
            if transfer.stage is not _Stage.COPYING:
                transfer.finish(self.why_shut)
        self._sweep()

    def advance(self, agent: NixlAgent, peer: NixlPeer) -> bool:
        """Posts, looks after what was posted, notifies; whether anything changed. Raises TransferError if NIXL does."""
        has_moved, num_posted = False, 0
        for transfer in self._queue:
            before = transfer.stage
            if before is _Stage.WAITING and num_posted < MAX_POSTED:
                self._post(peer, transfer)
            elif before is _Stage.COPYING:
                self._look_after(agent, transfer)
            elif before is _Stage.COPIED and transfer.is_cancelled:
                transfer.finish("cancelled")
            num_posted += transfer.stage is _Stage.COPYING
            has_moved = has_moved or transfer.stage is not before
        return self._notify(peer) or has_moved

    def heard(self, number: int) -> None:
        """The owner has a notice, perhaps ours."""
        if self._queue and self._queue[0].stage is _Stage.NOTIFIED and number == self._number:
            self._queue[0].finish()
            self._sweep()

    def abandon(self, agent: NixlAgent) -> None:
        """Gives up what is being copied."""
        for transfer in self._queue:
            if transfer.posting is not None:
                agent.abandon(transfer.posting)
            transfer.finish(self.why_shut)
        self._queue.clear()

    def _post(self, peer: NixlPeer, transfer: NixlTransfer) -> None:
        copy = transfer.copy
        if transfer.is_cancelled:
            transfer.finish("cancelled")
        elif self.is_granted and not copy.local_ids:
            self._copied(transfer)
        elif self.is_granted:
            transfer.stage = _Stage.COPYING  # before NIXL is called: if that raises, it may have begun
            operation = "READ" if copy.tag is None else "WRITE"
            transfer.posting = peer.copy(operation, copy.local, copy.local_ids, copy.remote, copy.remote_ids)
            if transfer.posting.state is TransferState.DONE:
                self._copied(transfer)

    def _look_after(self, agent: NixlAgent, transfer: NixlTransfer) -> None:
        if transfer.posting is not None and agent.advance(transfer.posting) is TransferState.DONE:
            self._copied(transfer)

    def _copied(self, transfer: NixlTransfer) -> None:
        if transfer.is_cancelled or self.why_shut:
            transfer.finish(self.why_shut or "cancelled")
        elif transfer.copy.notice is None:
            transfer.finish()
        else:
            transfer.stage = _Stage.COPIED

    def _notify(self, peer: NixlPeer) -> bool:
        self._sweep()
        head = self._queue[0] if self._queue else None
        if head is None or head.stage is not _Stage.COPIED:
            return False
        self._number = next(self._numbers)
        notice, tag = head.copy.notice or b"", self.tag or ""
        head.stage = _Stage.NOTIFIED
        peer.notify(encode_notice(Notice(self._link, self._number, tag, notice)))
        return True

    def _sweep(self) -> None:
        while self._queue and self._queue[0].stage is _Stage.OVER:
            self._queue.popleft()
