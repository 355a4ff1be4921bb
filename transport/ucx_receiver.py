"""The receiving side of the ucx transport: checks every frame, puts its payload in place, answers it.

    frames ──▶ malformed? hung up on     unknown tag? parked, 2 s at most     else, once its payload is here: applied
    payload (in UCX's memory) ──▶ received straight into the blocks where they lie together, else through a copy

Memory model: over TCP a payload is here whole before it is received: receiving it is one copy under the inbox's lock.
RDMA and GPU memory are written by the library itself: such a receive is held in its landing until it has ended.
UCX keeps payloads until they are received: those of parked frames are counted, and at most a window per peer of ours.
Threading: the I/O thread alone; the inbox is shared with the engine's thread under its lock.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any, NamedTuple

from core.errors import ProtocolError, TransferError
from transport.base import Blocks, Region
from transport.frames import Ack, Answer, Ask, Data, Nack, Notice
from transport.landing import CountedLanding, Inbox
from transport.parking import PARKING_TIMEOUT_S, Parking
from transport.pieces import gather, lie_together, scatter
from transport.regions import Span, resolve
from transport.ucx_socket import UcxSocket
from transport.ucx_wire import (
    MAX_FRAMES_IN_FLIGHT,
    MAX_MESSAGE_BYTES,
    Hello,
    Refusal,
    Welcome,
    decode_to_receiver,
    is_proven,
    welcome,
)
from transport.ucx_worker import UcxPeer, UcxWorker, array, failure_of, place

GREETING_TIMEOUT_S = 5.0
PAYLOAD_TIMEOUT_S = 10.0
"""How long a payload may stay away whose frame has come, or be on its way."""

MAX_WAITING_FRAMES = 4 * MAX_FRAMES_IN_FLIGHT
MAX_RUNNING = 16
_PARKED_COST_BYTES = 512


class _Parked(NamedTuple):
    """A frame whose tag is not expected yet; its payload waits in UCX's memory."""

    caller: UcxCaller
    frame: Data | Notice
    until_s: float

    @property
    def tag(self) -> str:
        return self.frame.tag

    def cost(self) -> int:
        num_bytes = len(self.frame.ids) * self.frame.num_bytes if isinstance(self.frame, Data) else 0
        return _PARKED_COST_BYTES + num_bytes


class _Running(NamedTuple):
    """A payload that is being received. landing, span: None for one that nobody wants."""

    frame: Data
    request: Any
    landing: CountedLanding | None
    span: Span | None
    copy: memoryview | None


class UcxReceiver:
    """What all callers share."""

    def __init__(self, worker: UcxWorker, token: str, regions: Mapping[int, Region], inbox: Inbox) -> None:
        self.worker = worker
        self.token = token
        self.regions = regions
        self.inbox = inbox
        self.parking: Parking[_Parked] = Parking()
        self.malformed = 0
        self._room = bytearray()

    def take_room(self, num_bytes: int) -> memoryview:
        """Room for a payload that is received through a copy: mostly the same, as a receive over TCP ends at once."""
        room, self._room = self._room, bytearray()
        if len(room) < num_bytes:
            room = bytearray(MAX_MESSAGE_BYTES)
        return memoryview(room)[:num_bytes]

    def return_room(self, room: memoryview) -> None:
        """Nobody needs it any more."""
        if isinstance(room.obj, bytearray):
            self._room = room.obj

    def is_early(self, tag: str) -> bool:
        """Whether nobody expects this tag, nor has lately. Under the inbox's lock."""
        return self.inbox.find(tag) is None and not self.inbox.was_closed(tag)

    def unpark(self, now_s: float) -> None:
        """Hands frames back to their callers whose tag is expected now, or whose time is over."""
        for tag in list(self.parking.by_tag):
            with self.inbox.lock:
                is_known = not self.is_early(tag)
            if is_known or self.parking.by_tag[tag][0].until_s < now_s:
                for parked in self.parking.take(tag):
                    parked.caller.waiting.append((parked.frame, False))


class UcxCaller:
    """One connection that somebody made to us. id_: under which it writes to us."""

    def __init__(self, receiver: UcxReceiver, socket: UcxSocket, id_: int, deadline_s: float) -> None:
        self.socket = socket
        self.waiting: collections.deque[tuple[Data | Notice, bool]] = collections.deque()
        self._receiver = receiver
        self._id = id_
        self._deadline_s = deadline_s
        self._peer: UcxPeer | None = None
        self._running: collections.deque[_Running] = collections.deque()
        self._acks: list[int] = []

    def is_greeted(self) -> bool:
        return self._peer is not None

    def is_busy(self) -> bool:
        """Whether something is expected to happen soon."""
        return bool(self.waiting or self._running) or (self._peer is not None and self._peer.is_sending())

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
        has_moved = self._finish()
        while self.waiting and self._take(self._peer, *self.waiting[0], now_s):
            has_moved = True
        if has_moved or not (self.waiting or self._running):
            self._deadline_s = now_s + PAYLOAD_TIMEOUT_S
        elif now_s > self._deadline_s:
            raise TransferError(f"a payload did not come within {PAYLOAD_TIMEOUT_S:.0f} s")
        self._flush(self._peer)

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
            peer.close([running.request for running in self._running], self._bury)

    def _bury(self) -> None:
        self._finish()
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

    def _take(self, peer: UcxPeer, frame: Data | Notice, may_park: bool, now_s: float) -> bool:
        """Applies, parks or refuses the first frame that waits; False if that must wait."""
        receiver = self._receiver
        if may_park:
            with receiver.inbox.lock:
                is_early = frame.tag in receiver.parking.by_tag or receiver.is_early(frame.tag)
            if is_early and receiver.parking.add(_Parked(self, frame, now_s + PARKING_TIMEOUT_S)):
                self.waiting.popleft()
                return True
        if isinstance(frame, Notice):
            if self._running:
                return False
            self._notify(peer, frame)
        elif not self._begin(peer, frame):
            return False
        self.waiting.popleft()
        return True

    def _notify(self, peer: UcxPeer, frame: Notice) -> None:
        with self._receiver.inbox.lock:
            landing = self._receiver.inbox.find(frame.tag)
            if landing is None:
                why = f"nothing is expected under tag {frame.tag!r}"
            else:
                why = "" if landing.notify(frame.notice) else "too many notices wait"
        self._settle(peer, frame.number, why)

    def _begin(self, peer: UcxPeer, frame: Data) -> bool:
        """Begins to receive a payload, and mostly ends it at once; False if it is not here yet."""
        receiver = self._receiver
        if len(self._running) >= MAX_RUNNING:
            return False
        num_bytes = receiver.worker.arrived(self._id, frame.number)
        if num_bytes is None:
            return False
        with receiver.inbox.lock:
            landing = receiver.inbox.find(frame.tag)
            span, why = self._span(frame, landing, num_bytes)
            if landing is None or span is None:
                running = _Running(frame, receiver.worker.discard(self._id, frame.number), None, None, None)
                self._settle(peer, frame.number, why)
            else:
                running = self._receive(frame, landing, span)
            self._running.append(running)
            self._finish()
        return True

    def _span(self, frame: Data, landing: CountedLanding | None, num_bytes: int) -> tuple[Span | None, str]:
        """Where a payload belongs, or why it belongs nowhere."""
        if landing is None:
            return None, f"nothing is expected under tag {frame.tag!r}"
        try:
            span = resolve(self._receiver.regions, blocks_of(frame), "own")
        except TransferError as error:
            self._receiver.malformed += 1
            return None, str(error)
        if num_bytes != len(frame.ids) * frame.num_bytes or num_bytes > MAX_MESSAGE_BYTES:
            self._receiver.malformed += 1
            return None, "the payload has another size than its frame says"
        if span.region.device is not None and not lie_together(span, frame.ids):
            return None, "blocks that lie apart in a GPU's memory must come one by one"
        why = landing.refusal(frame.region, frame.ids, span)
        return (None if why else span), why

    def _receive(self, frame: Data, landing: CountedLanding, span: Span) -> _Running:
        """Under the inbox's lock."""
        landing.hold()
        num_bytes = len(frame.ids) * span.num_bytes
        copy = None if lie_together(span, frame.ids) else self._receiver.take_room(num_bytes)
        into = place(span.address(frame.ids[0]), num_bytes) if copy is None else array(copy)
        return _Running(frame, self._receiver.worker.receive(self._id, frame.number, into), landing, span, copy)

    def _finish(self) -> bool:
        """Counts and answers what has been received; whether there was anything."""
        has_moved = False
        while self._running and self._running[0].request.completed:
            running = self._running.popleft()
            has_moved = True
            if running.landing is None or running.span is None:
                continue
            why = failure_of(running.request)
            with self._receiver.inbox.lock:
                is_open = self._receiver.inbox.find(running.frame.tag) is running.landing
                if not is_open:
                    why = why or f"nothing is expected under tag {running.frame.tag!r} any more"
                if not why and running.copy is not None:
                    scatter(running.copy, running.span, running.frame.ids)
                if not why:
                    running.landing.record(running.span, running.frame.ids)
                running.landing.release()
            if running.copy is not None:
                self._receiver.return_room(running.copy)
            if self._peer is not None:
                self._settle(self._peer, running.frame.number, why)
        return has_moved

    def _answer(self, peer: UcxPeer, ask: Ask) -> None:
        try:
            span = resolve(self._receiver.regions, blocks_of(ask), "own")
        except TransferError as error:
            self._receiver.malformed += 1
            peer.say(Nack(ask.number, str(error)[:1024]))
            return
        if len(ask.ids) * span.num_bytes > MAX_MESSAGE_BYTES:
            self._receiver.malformed += 1
            peer.say(Nack(ask.number, "more than one frame was asked for"))
        elif span.region.device is not None and not lie_together(span, ask.ids):
            peer.say(Nack(ask.number, "blocks that lie apart in a GPU's memory must be asked for one by one"))
        else:
            peer.say(Answer(ask.number))
            peer.send_payload(ask.number, gather(span, ask.ids))

    def _settle(self, peer: UcxPeer, number: int, why_not: str) -> None:
        if why_not:
            peer.say(Nack(number, why_not[:1024]))
            return
        self._acks.append(number)
        if len(self._acks) >= MAX_FRAMES_IN_FLIGHT // 4:
            self._flush(peer)

    def _flush(self, peer: UcxPeer) -> None:
        if self._acks:
            peer.say(Ack(self._acks))
            self._acks = []
        peer.flush()


def blocks_of(frame: Data | Ask) -> Blocks:
    """The part of our memory that a frame names."""
    return Blocks(frame.region, tuple(frame.ids), frame.start, frame.num_bytes)
