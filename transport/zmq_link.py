"""The sending side of one zmq connection, driven by the transport's I/O thread.

    Endpoint.write ──▶ queue ──▶ frames in flight (at most WINDOW_BYTES) ──▶ Ack, Nack, Answer ──▶ transfer ends

Memory model: payloads are views of local memory where the blocks lie together, copies otherwise; ZMQ may read them
until the transfer has ended, and for a moment after an endpoint was closed. So a cancelled transfer keeps running
until every frame of it that is under way has been answered: then no write of it can follow any more.
Threading: everything here belongs to the I/O thread, except `start`, `cancel` and `close`, which other threads call:
they only append to deques and read what changes once (`Work.state`, `why_failed`).
"""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Callable
from typing import NamedTuple

import zmq

from transport.keys import Keys
from transport.zmq_buffers import FrameBuffers
from transport.zmq_line import ZmqLine
from transport.zmq_transfer import ZmqTransfer, payload_bytes
from transport.zmq_wire import (
    MAX_FRAMES_IN_FLIGHT,
    WINDOW_BYTES,
    Ack,
    Answer,
    Hello,
    Nack,
    Piece,
    Welcome,
    ZmqDescription,
    decode_to_sender,
    encode,
)

CONNECT_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 2.0
MESSAGES_PER_TURN = 64
FRAME_COST_BYTES = 512
ANSWER_TIMEOUT_S = 10.0
"""A receiver answers within milliseconds, early frames within two seconds; one that says nothing for so long while
frames are under way is gone, whatever the connection between us pretends."""


class _Sent(NamedTuple):
    """A frame that has not been answered yet; no piece for a notice."""

    transfer: ZmqTransfer
    piece: Piece | None
    cost: int


class ZmqLink:
    """One connection. `wake` makes the I/O thread take a turn."""

    def __init__(self, description: ZmqDescription, deadline_s: float, wake: Callable[[], None]) -> None:
        self._description = description
        self._deadline_s = deadline_s
        self._wake = wake
        self._queue: collections.deque[ZmqTransfer] = collections.deque()
        self._cancelled: collections.deque[ZmqTransfer] = collections.deque()
        self._window = _Window()
        self._buffers = FrameBuffers()
        self._is_welcome = False
        self._is_closing = threading.Event()
        self._is_over = threading.Event()
        self.why_failed = ""
        self.malformed = 0

    # Other threads.

    def start(self, transfer: ZmqTransfer) -> None:
        """Queues a transfer."""
        self._queue.append(transfer)
        if self.why_failed:
            transfer.fail(self.why_failed)
        self._wake()

    def cancel(self, transfer: ZmqTransfer) -> None:
        """Asks the I/O thread to send no more of it."""
        self._cancelled.append(transfer)
        self._wake()

    def close(self) -> None:
        """Waits for our own I/O thread to close the socket; every transfer has ended then."""
        self._is_closing.set()
        self._wake()
        self._is_over.wait(CLOSE_TIMEOUT_S)

    # The I/O thread.

    def open(self, context: zmq.Context[zmq.Socket[bytes]], keys: Keys | None) -> None:
        """Begins to connect. Raises zmq.ZMQError where the system refuses a socket."""
        self.line = ZmqLine(context, self._description.address, keys)
        with contextlib.suppress(zmq.Again):  # refused already: the line will say why
            self.line.socket.send(encode(Hello(self._description.token)), zmq.NOBLOCK)

    def turn(self, now_s: float, is_readable: bool, is_monitored: bool) -> bool:
        """Does what can be done now; False once the link is over."""
        if is_readable:
            self._receive()
        self._watch(now_s, is_monitored, is_heard=is_readable)
        self._take_cancelled()
        if self.why_failed:
            return False
        if self._is_welcome:
            self._send()
        return True

    def fail(self, why: str) -> None:
        """Ends every transfer; the link is over."""
        self.why_failed = self.why_failed or why
        for sent in self._window.frames.values():
            sent.transfer.fail(self.why_failed)
        self._window, self._buffers = _Window(), FrameBuffers()
        while self._queue:
            self._queue.popleft().fail(self.why_failed)

    def shut(self) -> None:
        """Closes the sockets."""
        if hasattr(self, "line"):
            self.line.close()
        self._is_over.set()

    def _watch(self, now_s: float, is_monitored: bool, *, is_heard: bool) -> None:
        address, why = self._description.address, self.line.why_ended(now_s, is_monitored)
        if self._is_closing.is_set():
            self.fail("the endpoint is closed")
        elif why is not None:
            self.fail(
                f"{'lost the connection to' if self._is_welcome else 'cannot connect to'} {address}{why and ': '}{why}"
            )
        elif not self._is_welcome and now_s > self._deadline_s:
            self.fail(f"no answer from {address} within {CONNECT_TIMEOUT_S:.0f} s")
        elif self._window.is_overdue(now_s, is_heard=is_heard):
            self.fail(f"{address} has answered nothing for {ANSWER_TIMEOUT_S:.0f} s, with writes under way")

    def _take_cancelled(self) -> None:
        while self._cancelled:
            self._cancelled.popleft().stop("cancelled")

    def _send(self) -> None:
        while self._queue and not self._window.is_full():
            transfer = self._queue[0]
            frame = transfer.next_frame(self._window.next_number, self._buffers)
            if frame is None:
                self._queue.popleft()
                transfer.end_if_answered()
                continue
            piece, parts = frame
            self.line.socket.send_multipart(parts, zmq.NOBLOCK, copy=False)
            self._window.add(_Sent(transfer, piece, FRAME_COST_BYTES + (payload_bytes(piece) if piece else 0)))

    def _receive(self) -> None:
        for _ in range(MESSAGES_PER_TURN):
            try:
                parts = self.line.receive()
            except zmq.Again:
                return
            if not parts or not self._handle(parts[0], parts[1:]):
                self.malformed += 1

    def _handle(self, header: zmq.Frame, payload: list[zmq.Frame]) -> bool:
        frame = decode_to_sender(header.buffer)
        match frame:
            case Welcome():
                self._is_welcome = True
            case Ack(numbers):
                return all([self._answered(number) for number in numbers])
            case Nack(number, why):
                return self._answered(number, why)
            case Answer(number) if len(payload) == 1:
                return self._fill(number, payload[0])
            case _:
                return False
        return True

    def _answered(self, number: int, why_not: str = "") -> bool:
        sent = self._window.take(number)
        if sent is None:
            return False
        self._buffers.answered(number)
        if why_not:
            sent.transfer.stop(f"the receiver refused: {why_not}")
        sent.transfer.answered()
        return True

    def _fill(self, number: int, payload: zmq.Frame) -> bool:
        sent = self._window.frames.get(number)
        if sent is None or sent.piece is None or not sent.transfer.fill(sent.piece, payload):
            return False
        return self._answered(number)


class _Window:
    """Frames under way, by number."""

    def __init__(self) -> None:
        self.frames: dict[int, _Sent] = {}
        self.next_number = 0
        self._num_bytes = 0
        self._heard_s = 0.0

    def is_full(self) -> bool:
        return self._num_bytes >= WINDOW_BYTES or len(self.frames) >= MAX_FRAMES_IN_FLIGHT

    def is_overdue(self, now_s: float, *, is_heard: bool) -> bool:
        """Whether frames have been under way for too long without a word. is_heard: there was one just now."""
        if is_heard or not self.frames:
            self._heard_s = now_s
        return now_s - self._heard_s > ANSWER_TIMEOUT_S

    def add(self, sent: _Sent) -> None:
        self.frames[self.next_number] = sent
        self.next_number += 1
        self._num_bytes += sent.cost

    def take(self, number: int) -> _Sent | None:
        sent = self.frames.pop(number, None)
        if sent is not None:
            self._num_bytes -= sent.cost
        return sent
