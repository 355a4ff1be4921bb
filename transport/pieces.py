"""One write or read that travels in frames: cut on demand, ended by the answers to them.

Memory model: holds block numbers only; a frame's payload is a view of local memory where its blocks lie together, and
a gathered copy otherwise.
Threading: `poll`, `failure` and `cancel` are its owner's; everything else is the I/O thread's. `state` changes once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from transport.base import Region, TransferState
from transport.copying import copy_pairs
from transport.frames import FRAME_BYTES, Ask, Data, Notice, Piece, cut
from transport.regions import Span, is_run, view


class Task(NamedTuple):
    """What to move. `tag` is None for a read."""

    local: Span
    local_ids: tuple[int, ...]
    remote: Span
    remote_ids: tuple[int, ...]
    tag: str | None = None
    notice: bytes | None = None


class PiecewiseTransfer:
    """See transport/base.py. `on_cancel` hands a cancellation, with the transfer itself, to the I/O thread."""

    copy_s = 0.0

    def __init__(self, task: Task, on_cancel: Callable[[Any], None], frame_bytes: int = FRAME_BYTES) -> None:
        self._task = task
        self._on_cancel = on_cancel
        self._pieces: Iterator[Piece] = cut(len(task.local_ids), 0, task.local.num_bytes, frame_bytes)
        self._notice = task.notice
        self._num_unanswered = 0
        self._is_sent = False
        self._state = TransferState.RUNNING
        self._why_failed = ""

    def poll(self) -> TransferState:
        return self._state

    def cancel(self) -> None:
        if self._state is TransferState.RUNNING:
            self._on_cancel(self)

    def failure(self) -> str:
        return self._why_failed if self._state is TransferState.FAILED else ""

    def fail(self, why: str) -> None:
        """Ends it now, unless it has ended."""
        if self._state is TransferState.RUNNING:
            self._why_failed = self._why_failed or why
            self._state = TransferState.FAILED

    def stop(self, why: str) -> None:
        """Sends no more of it; ends it as soon as what is under way has been answered."""
        if self._state is TransferState.RUNNING:
            self._why_failed = self._why_failed or why
            self._is_sent = True
            self.end_if_answered()

    def answered(self) -> None:
        """One of its frames has been answered."""
        self._num_unanswered -= 1
        self.end_if_answered()

    def end_if_answered(self) -> None:
        """Ends it if nothing of it is left to send or to be answered."""
        if self._is_sent and self._num_unanswered == 0 and self._state is TransferState.RUNNING:
            self._state = TransferState.FAILED if self._why_failed else TransferState.DONE

    def take(self, number: int) -> tuple[Piece | None, Data | Ask | Notice] | None:
        """The next frame under this number; None where nothing is left to send."""
        piece = None if self._is_sent else next(self._pieces, None)
        if piece is not None:
            self._num_unanswered += 1
            return piece, self._frame(number, piece)
        if self._notice is None or self._is_sent or self._task.tag is None:
            self._is_sent = True
            return None
        notice, self._notice = self._notice, None
        self._num_unanswered += 1
        return None, Notice(number, self._task.tag, notice)

    def is_read(self) -> bool:
        """Whether the peer sends the payloads."""
        return self._task.tag is None

    def is_on_device(self) -> bool:
        """Whether either side's memory is a GPU's."""
        return self._task.local.region.device is not None or self._task.remote.region.device is not None

    def local(self, piece: Piece) -> tuple[Span, tuple[int, ...]]:
        """Where a piece's bytes lie, or shall lie, in local memory."""
        return self._part(self._task.local, piece), self._task.local_ids[piece.first : piece.last]

    def _frame(self, number: int, piece: Piece) -> Data | Ask:
        task = self._task
        remote = self._part(task.remote, piece)
        ids = list(task.remote_ids[piece.first : piece.last])
        if task.tag is None:
            return Ask(number, remote.region.id, ids, remote.start, remote.num_bytes)
        return Data(number, task.tag, remote.region.id, ids, remote.start, remote.num_bytes)

    def _part(self, span: Span, piece: Piece) -> Span:
        return Span(span.region, span.start + piece.start, piece.num_bytes)


def payload_bytes(piece: Piece) -> int:
    """Size of a piece's payload."""
    return (piece.last - piece.first) * piece.num_bytes


def lie_together(span: Span, ids: Sequence[int]) -> bool:
    """Whether the span's bytes of these blocks are consecutive in memory."""
    return len(ids) == 1 or (span.is_dense() and is_run(ids))


def _new_room(num_bytes: int) -> memoryview:
    return memoryview(bytearray(num_bytes))


def gather(span: Span, ids: Sequence[int], room: Callable[[int], memoryview] = _new_room) -> memoryview:
    """The span's bytes of these blocks, one after the other; without a copy where they lie like that. room: makes
    memory of a size."""
    if lie_together(span, ids):
        return view(span.address(ids[0]), len(ids) * span.num_bytes)
    gathered = room(len(ids) * span.num_bytes)
    gather_into(gathered, span, ids)
    return gathered


def gather_into(payload: memoryview, span: Span, ids: Sequence[int]) -> None:
    """Copies the span's bytes of these blocks, one after the other; the payload has exactly the right size."""
    target = _packed(ctypes.addressof(ctypes.c_char.from_buffer(payload)), span.num_bytes, len(ids))
    copy_pairs(span, ids, target, range(len(ids)))


def scatter(payload: bytearray | memoryview, span: Span, ids: Sequence[int]) -> None:
    """The reverse of `gather_into`; the payload has exactly the right size and is writable."""
    source = _packed(ctypes.addressof(ctypes.c_char.from_buffer(payload)), span.num_bytes, len(ids))
    copy_pairs(source, range(len(ids)), span, ids)


def _packed(address: int, block_bytes: int, num_blocks: int) -> Span:
    """A payload, seen as blocks without gaps."""
    return Span(Region(0, address, block_bytes, block_bytes, num_blocks), 0, block_bytes)
