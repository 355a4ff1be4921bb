"""One connection that somebody made to a ucx transport: greeted, its frames taken in order, each answered.

    hello ──▶ proven? welcome    frames ──▶ waiting ──▶ parked, 2 s at most ──▶ payloads, notices ──▶ Ack, Nack
                                 Ask ──▶ Answer and a payload

Memory model: bounded; MAX_WAITING_FRAMES wait, and the payloads of MAX_RUNNING are under way (ucx_payloads.py).
Threading: the I/O thread alone; the inbox is shared with the engine's thread under its lock.
"""

from __future__ import annotations

import collections

from core.errors import ProtocolError, TransferError
from transport.frames import Ack, Answer, Ask, Nack, Notice
from transport.parking import PARKING_TIMEOUT_S
from transport.ucx_payloads import Settled, UcxPayloads
from transport.ucx_receiver import Parked, UcxReceiver
from transport.ucx_socket import UcxSocket
from transport.ucx_wire import (
    MAX_FRAMES_IN_FLIGHT,
    Hello,
    Parcel,
    Refusal,
    Welcome,
    decode_to_receiver,
    is_proven,
    welcome,
)
from transport.ucx_worker import UcxPeer

GREETING_TIMEOUT_S = 5.0
PAYLOAD_TIMEOUT_S = 10.0
"""How long a payload may stay away whose frame has come, or be on its way."""

MAX_WAITING_FRAMES = 4 * MAX_FRAMES_IN_FLIGHT
ACKS_PER_WORD = 4


class UcxCaller:
    """One connection that somebody made to us. id_: under which it writes to us."""

    def __init__(self, receiver: UcxReceiver, socket: UcxSocket, id_: int, deadline_s: float) -> None:
        self.socket = socket
        self.waiting: collections.deque[tuple[Parcel | Notice, bool]] = collections.deque()
        self._receiver = receiver
        self._id = id_
        self._deadline_s = deadline_s
        self._peer: UcxPeer | None = None
        self._payloads = UcxPayloads(receiver, id_)
        self._acks: list[int] = []

    def is_greeted(self) -> bool:
        return self._peer is not None

    def is_busy(self) -> bool:
        """Whether something is expected to happen soon."""
        return (
            bool(self.waiting) or not self._payloads.is_empty() or (self._peer is not None and self._peer.is_sending())
        )

    def take_control(self, message: memoryview) -> None:
        """A batch of frames. Raises ProtocolError if it is malformed, or more than any sender of ours would send."""
        frames = decode_to_receiver(message)
        if not frames or self._peer is None:
            raise ProtocolError("malformed frames")
        for frame in frames:
            if isinstance(frame, Ask):
                self._answer(self._peer, frame)
            else:
                self.waiting.append((frame, True))
        if len(self.waiting) > MAX_WAITING_FRAMES:
            raise ProtocolError(f"more than {MAX_WAITING_FRAMES} frames at once")

    def turn(self, now_s: float, is_ready: bool) -> None:
        """Does what can be done now. Raises BatonError if the connection is to be ended. is_ready: its socket is."""
        greeting = self.socket.turn() if is_ready else None
        if greeting is not None:
            self._greet(greeting)
        if self._peer is None:
            if now_s > self._deadline_s:
                raise TransferError(f"no greeting within {GREETING_TIMEOUT_S:.0f} s")
            return
        if self._peer.failure():
            raise TransferError(self._peer.failure())
        has_moved = False
        while self._step(self._peer, now_s):
            has_moved = True
        if has_moved or (not self.waiting and self._payloads.is_empty()):
            self._deadline_s = now_s + PAYLOAD_TIMEOUT_S
        elif now_s > self._deadline_s:
            raise TransferError(f"a payload did not come within {PAYLOAD_TIMEOUT_S:.0f} s")
        self._flush(self._peer)

    def _step(self, peer: UcxPeer, now_s: float) -> bool:
        """Ends what has been received, then begins what can be; whether there was anything."""
        settled = self._payloads.take_settled()
        for each in settled:
            self._settle(peer, each)
        has_moved = bool(settled)
        while self.waiting and self._take(peer, *self.waiting[0], now_s):
            has_moved = True
        return has_moved

    def refuse(self, why: str) -> None:
        """Tells the other end why it is hung up on, if it was not greeted yet."""
        if self._peer is None:
            self.socket.say(Refusal(why[:1024]))

    def close(self) -> None:
        """Begins nothing any more. What is being received comes to its end, and is held in its landing so long."""
        self.socket.close()
        self.waiting.clear()
        if self._peer is not None:
            peer, self._peer = self._peer, None
            peer.close(self._payloads.requests(), self._bury)

    def _bury(self) -> None:
        self._payloads.take_settled()
        self._receiver.worker.discard_all(self._id)

    def _greet(self, greeting: Hello | Welcome | Refusal) -> None:
        receiver = self._receiver
        if not isinstance(greeting, Hello):
            raise ProtocolError("a caller says hello first")
        if not is_proven(greeting, receiver.token):
            raise ProtocolError("the token is not that of this transport: its description is of an earlier boot")
        self._peer = UcxPeer(receiver.worker, greeting.address, greeting.id)
        self.socket.say(welcome(receiver.token, receiver.worker.address, self._id))
        self.socket.turn()

    def _take(self, peer: UcxPeer, frame: Parcel | Notice, may_park: bool, now_s: float) -> bool:
        """Applies, parks or refuses the first frame that waits; False if that must wait."""
        receiver = self._receiver
        if may_park:
            with receiver.inbox.lock:
                is_early = frame.tag in receiver.parking.by_tag or receiver.is_early(frame.tag)
            if is_early and receiver.parking.add(Parked(self.waiting, frame, now_s + PARKING_TIMEOUT_S)):
                self.waiting.popleft()
                return True
        if isinstance(frame, Notice):
            if not self._payloads.is_empty():
                return False
            self._settle(peer, Settled(frame.number, receiver.notify(frame)))
        elif not self._payloads.begin(peer, frame):
            return False
        self.waiting.popleft()
        return True

    def _answer(self, peer: UcxPeer, ask: Ask) -> None:
        try:
            payload = self._receiver.payload_for(ask)
        except TransferError as error:
            peer.say(Nack(ask.number, str(error)[:1024]))
            return
        peer.say(Answer(ask.number))
        peer.send_payload(ask.number, payload)

    def _settle(self, peer: UcxPeer, settled: Settled) -> None:
        if settled.why_not:
            peer.say(Nack(settled.number, settled.why_not[:1024]))
            return
        self._acks.append(settled.number)
        if len(self._acks) >= ACKS_PER_WORD:
            self._flush(peer)

    def _flush(self, peer: UcxPeer) -> None:
        if self._acks:
            peer.say(Ack(self._acks))
            self._acks = []
        peer.flush()
