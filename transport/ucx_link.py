"""The sending side of one ucx connection, driven by the transport's I/O thread.

    Endpoint.write ──▶ queue ──▶ frames in flight (at most WINDOW_BYTES) ──▶ Ack, Nack, Answer ──▶ transfer ends

Memory model: payloads are views of local memory or copies, see transport/ucx_outgoing.py. A cancelled transfer keeps
running until every frame of it that is under way has been answered; a failed one ends after UCX has let go of its
memory.
Threading: everything here belongs to the I/O thread, except `start`, `cancel` and `close`, which other threads call:
they only append to deques and read what changes once.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from core.errors import BatonError, ProtocolError
from transport.frames import Ack, Answer, Ask, Data, Nack, Notice, Piece
from transport.pieces import PiecewiseTransfer, lie_together, payload_bytes, scatter
from transport.ucx_outgoing import Outgoing
from transport.ucx_socket import UcxSocket
from transport.ucx_wire import (
    MAX_FRAMES_IN_FLIGHT,
    NUMBER_MASK,
    WINDOW_BYTES,
    Refusal,
    UcxDescription,
    Welcome,
    decode_to_sender,
    hello,
    is_proven,
)
from transport.ucx_worker import UcxPeer, UcxWorker, array, failure_of, place
from transport.zmq_buffers import FrameBuffers

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 10.0
"""A receiver answers within milliseconds, early frames within two seconds."""

CLOSE_TIMEOUT_S = 2.0
FRAME_COST_BYTES = 512


class UcxLink:
    """One connection. `wake` makes the I/O thread take a turn."""

    def __init__(self, description: UcxDescription, deadline_s: float, wake: Callable[[], None]) -> None:
        self._description = description
        self._deadline_s = deadline_s
        self._wake = wake
        self._orders = _Orders()
        self._window = _Window()
        self._line: _Line | None = None
        self.why_failed = ""
        self.malformed = 0

    # Other threads.

    def start(self, transfer: PiecewiseTransfer) -> None:
        """Queues a transfer."""
        self._orders.queue.append(transfer)
        if self.why_failed:
            transfer.fail(self.why_failed)
        self._wake()

    def cancel(self, transfer: PiecewiseTransfer) -> None:
        """Asks the I/O thread to send no more of it."""
        self._orders.cancelled.append(transfer)
        self._wake()

    def close(self) -> None:
        """Waits for our own I/O thread to end the connection; every transfer has ended then."""
        self._orders.is_closing.set()
        self._wake()
        self._orders.is_over.wait(CLOSE_TIMEOUT_S)

    # The I/O thread.

    def open(self, worker: UcxWorker, id_: int) -> UcxSocket:
        """Begins to connect. Raises TransferError if that is impossible."""
        self._line = _Line(worker, UcxSocket.connect(self._description.address), id_)
        self._line.socket.say(hello(self._description.token, worker.address, id_))
        return self._line.socket

    def is_busy(self) -> bool:
        """Whether something is under way, or waits to be."""
        return bool(self._window.frames or self._orders.queue)

    def has_deadline(self) -> bool:
        """Whether it must be looked at again soon even if nothing happens."""
        return self._line is None or self._line.peer is None or bool(self._window.frames)

    def take_control(self, message: memoryview) -> None:
        """A batch of frames from the receiver."""
        frames = decode_to_sender(message)
        if not frames or self._line is None:
            self.malformed += 1
            return
        self._window.is_heard = True
        for frame in frames:
            match frame:
                case Ack(numbers):
                    is_sound = all([self._answered(number) for number in numbers])
                case Nack(number, why):
                    is_sound = self._answered(number, why)
                case Answer(number):
                    is_sound = self._expect(number)
            self.malformed += not is_sound

    def turn(self, now_s: float, is_ready: bool) -> bool:
        """Does what can be done now; False once the link is over. is_ready: its socket is."""
        line = self._line
        if self._orders.is_closing.is_set():
            self.fail("the endpoint is closed")
        elif line is None:
            return True
        elif not self.why_failed:
            self._look(line, now_s, is_ready)
        while self._orders.cancelled:
            self._orders.cancelled.popleft().stop("cancelled")
        if self.why_failed:
            return False
        if line is not None and line.peer is not None:
            self._fill(line)
            self._send(line, line.peer)
        return True

    def fail(self, why: str) -> None:
        """Lets UCX let go of all memory, then ends every transfer; the link is over."""
        self.why_failed = self.why_failed or why
        line, self._line = self._line, None
        sent, self._window = list(self._window.frames.values()), _Window()

        def end() -> None:
            for each in sent:
                for transfer, _ in each.parts:
                    transfer.fail(self.why_failed)

        if line is None:
            end()
        else:
            line.close(end)
        while self._orders.queue:
            self._orders.queue.popleft().fail(self.why_failed)

    def shut(self) -> None:
        """Nothing will happen any more."""
        self._orders.is_over.set()

    def _look(self, line: _Line, now_s: float, is_ready: bool) -> None:
        """At the handshake, the deadlines, the other end's life."""
        address = self._description.address
        try:
            greeting = line.socket.turn() if is_ready else None
            if isinstance(greeting, Welcome):
                if not is_proven(greeting, self._description.token):
                    raise ProtocolError("it does not know the token of the description")
                line.peer = UcxPeer(line.worker, greeting.address, greeting.id)
            elif greeting is not None:
                why = greeting.why if isinstance(greeting, Refusal) else "it says hello like a sender"
                self.fail(f"{address} refused the connection: {why}")
        except BatonError as error:
            self.fail(f"{'cannot connect to' if line.peer is None else 'lost the connection to'} {address}: {error}")
            return
        if line.peer is None:
            if now_s > self._deadline_s:
                self.fail(f"no answer from {address} within {CONNECT_TIMEOUT_S:.0f} s")
        elif line.peer.failure():
            self.fail(f"lost the connection to {address}: {line.peer.failure()}")
        elif self._window.is_overdue(now_s):
            self.fail(f"{address} has answered nothing for {ANSWER_TIMEOUT_S:.0f} s, with frames under way")

    def _send(self, line: _Line, peer: UcxPeer) -> None:
        """Fills the window: first every frame, so that the receiver can ask for the payloads ahead, then payload by
        payload as it is gathered, so that the first travels while the next are being copied."""
        frames = self._take_frames()
        for frame in frames:
            peer.say(frame.parcel() if isinstance(frame, Outgoing) else frame)
        peer.flush()
        for frame in frames:
            if isinstance(frame, Outgoing):
                peer.send_payload(frame.number, frame.payload(line.buffers))
                line.worker.advance()

    def _take_frames(self) -> list[Outgoing | Ask | Notice]:
        """As many as fit into the window."""
        frames: list[Outgoing | Ask | Notice] = []
        while self._orders.queue and not self._window.is_full():
            transfer = self._orders.queue[0]
            taken = transfer.take(self._window.next_number)
            if taken is None:
                self._orders.queue.popleft()
                transfer.end_if_answered()
                continue
            piece, frame = taken
            if piece is None or not isinstance(frame, Data):
                assert not isinstance(frame, Data)
                frames.append(frame)
                self._window.add(transfer, piece)
                continue
            last = frames[-1] if frames else None
            if isinstance(last, Outgoing) and last.takes(frame, transfer, piece):
                self._window.join(last.number, transfer, piece)
            else:
                last = Outgoing(frame.number, frame.tag)
                frames.append(last)
                self._window.add(transfer, piece)
            last.add(frame, transfer, piece)
        return frames

    def _answered(self, number: int, why_not: str = "") -> bool:
        sent = self._window.take(number)
        if sent is None:
            return False
        if self._line is not None:
            self._line.buffers.answered(number)
        for transfer, _ in sent.parts:
            if why_not:
                transfer.stop(f"the receiver refused: {why_not}")
            transfer.answered()
        return True

    def _expect(self, number: int) -> bool:
        sent = self._window.frames.get(number)
        if self._line is None or sent is None:
            return False
        transfer, piece = sent.parts[0]
        if piece is None or not transfer.is_read() or any(number == answer.number for answer in self._line.answers):
            return False
        self._line.answers.append(_Answered(number, transfer, piece))
        return True

    def _fill(self, line: _Line) -> None:
        """Puts the answers that have arrived in place."""
        while line.answers:
            if not line.fill(*line.answers[0]):
                return
            self._answered(line.answers.popleft().number, line.why_unfilled)


class _Sent:
    """A frame that has not been answered yet, and what it has of which transfers; no piece for a notice."""

    def __init__(self) -> None:
        self.parts: list[tuple[PiecewiseTransfer, Piece | None]] = []
        self.cost = FRAME_COST_BYTES


class _Answered(NamedTuple):
    """A payload that we have asked for, and that is on its way."""

    number: int
    transfer: PiecewiseTransfer
    piece: Piece


class _Orders:
    """What other threads want."""

    def __init__(self) -> None:
        self.queue: collections.deque[PiecewiseTransfer] = collections.deque()
        self.cancelled: collections.deque[PiecewiseTransfer] = collections.deque()
        self.is_closing = threading.Event()
        self.is_over = threading.Event()


class _Line:
    """The connection itself; no peer before the receiver has said welcome."""

    def __init__(self, worker: UcxWorker, socket: UcxSocket, id_: int) -> None:
        self.worker = worker
        self.socket = socket
        self.peer: UcxPeer | None = None
        self.answers: collections.deque[_Answered] = collections.deque()
        self.buffers = FrameBuffers()
        self.why_unfilled = ""
        self._id = id_
        self._running: tuple[Any, bytearray | None] | None = None

    def fill(self, number: int, transfer: PiecewiseTransfer, piece: Piece) -> bool:
        """Whether the payload is in place, or never will be (`why_unfilled`)."""
        span, ids = transfer.local(piece)
        if self._running is None:
            num_bytes = self.worker.arrived(self._id, number)
            if num_bytes is None:
                return False
            if num_bytes != payload_bytes(piece):
                self._running = self.worker.discard(self._id, number), None
                self.why_unfilled = f"{num_bytes} bytes came where {payload_bytes(piece)} were asked for"
            elif lie_together(span, ids):
                self._running = self.worker.receive(self._id, number, place(span.address(ids[0]), num_bytes)), None
            else:
                gathered = bytearray(num_bytes)
                self._running = self.worker.receive(self._id, number, array(gathered)), gathered
        request, gathered_or_none = self._running
        if not request.completed:
            return False
        self._running = None
        self.why_unfilled = self.why_unfilled or failure_of(request)
        if gathered_or_none is not None and not self.why_unfilled:
            scatter(gathered_or_none, span, ids)
        return True

    def close(self, then: Callable[[], None]) -> None:
        """UCX lets go of all memory of this connection; `then` is called afterwards."""
        self.socket.close()

        def bury() -> None:
            self.worker.discard_all(self._id)
            then()

        if self.peer is None:
            bury()
        else:
            self.peer.close([self._running[0]] if self._running is not None else [], bury)


class _Window:
    """Frames under way, by number."""

    def __init__(self) -> None:
        self.frames: dict[int, _Sent] = {}
        self.next_number = 0
        self.is_heard = False
        self._num_bytes = 0
        self._heard_s = 0.0

    def is_full(self) -> bool:
        return self._num_bytes >= WINDOW_BYTES or len(self.frames) >= MAX_FRAMES_IN_FLIGHT

    def is_overdue(self, now_s: float) -> bool:
        """Whether frames have been under way for too long without a word."""
        if self.is_heard or not self.frames:
            self._heard_s, self.is_heard = now_s, False
        return now_s - self._heard_s > ANSWER_TIMEOUT_S

    def add(self, transfer: PiecewiseTransfer, piece: Piece | None) -> None:
        """A frame under the next number."""
        number = self.next_number
        self.frames[number] = _Sent()
        self.next_number = (number + 1) & NUMBER_MASK
        self._num_bytes += FRAME_COST_BYTES
        self.join(number, transfer, piece)

    def join(self, number: int, transfer: PiecewiseTransfer, piece: Piece | None) -> None:
        """One more piece in a frame."""
        sent, num_bytes = self.frames[number], payload_bytes(piece) if piece else 0
        sent.parts.append((transfer, piece))
        sent.cost += num_bytes
        self._num_bytes += num_bytes

    def take(self, number: int) -> _Sent | None:
        sent = self.frames.pop(number, None)
        if sent is not None:
            self._num_bytes -= sent.cost
        return sent
