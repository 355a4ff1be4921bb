"""The receiving side of the ucx transport: checks every frame, puts its payload in place, answers it.

    frames ──▶ malformed? hung up on     unknown tag? parked, 2 s at most     else: applied, with its payload
    payload ──▶ blocks lie apart: into a room asked for ahead (transport/ucx_rooms.py), and from there into the blocks
            ──▶ they lie together: once it is here, straight from UCX's memory into the blocks

Memory model: a room belongs to nobody's blocks, so a landing may close while one is being filled; what came is put in
place only if the landing is still open then, under the inbox's lock. A payload that goes straight into the blocks is
here whole before it is received (TCP), which is one copy under that lock; RDMA and GPU memory are written by the
library itself, and such a receive is held in its landing until it has ended.
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
from transport.ucx_rooms import Room, Rooms
from transport.ucx_socket import UcxSocket
from transport.ucx_wire import (
    MAX_FRAMES_IN_FLIGHT,
    MAX_MESSAGE_BYTES,
    Hello,
    Refusal,
    Welcome,
    decode_to_receiver,
    is_proven,
    payload_tag,
    welcome,
)
from transport.ucx_worker import UcxPeer, UcxWorker, failure_of, place

GREETING_TIMEOUT_S = 5.0
PAYLOAD_TIMEOUT_S = 10.0
"""How long a payload may stay away whose frame has come, or be on its way."""

MAX_WAITING_FRAMES = 4 * MAX_FRAMES_IN_FLIGHT
MAX_RUNNING = 16
ACKS_PER_WORD = 4
WRONG_SIZE = "the payload has another size than its frame says"
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
    """A payload that is being received: into a room, or straight into a landing's blocks, or away (neither)."""

    frame: Data
    request: Any
    room: Room | None = None
    landing: CountedLanding | None = None


class UcxReceiver:
    """What all callers share."""

    def __init__(self, worker: UcxWorker, token: str, regions: Mapping[int, Region], inbox: Inbox) -> None:
        self.worker = worker
        self.token = token
        self.regions = regions
        self.inbox = inbox
        self.parking: Parking[_Parked] = Parking()
        self.malformed = 0
        self.rooms = Rooms()

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
        self._running: list[_Running] = []
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
        has_moved = False
        while self._step(self._peer, now_s):
            has_moved = True
        if has_moved or not (self.waiting or self._running):
            self._deadline_s = now_s + PAYLOAD_TIMEOUT_S
        elif now_s > self._deadline_s:
            raise TransferError(f"a payload did not come within {PAYLOAD_TIMEOUT_S:.0f} s")
        self._flush(self._peer)

    def _step(self, peer: UcxPeer, now_s: float) -> bool:
        """Ends what has been received, then begins what can be; whether there was anything."""
        has_moved = self._finish()
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
        """Begins to receive a payload; False if it must wait."""
        if len(self._running) >= MAX_RUNNING:
            return False
        return self._receive_ahead(peer, frame) or self._receive_arrived(peer, frame)

    def _receive_ahead(self, peer: UcxPeer, frame: Data) -> bool:
        """Asks for a payload that may not be here yet, if it is one for a room. Raises TransferError if UCX refuses."""
        receiver = self._receiver
        if not receiver.worker.is_tcp_alone:
            return False
        try:
            span = resolve(receiver.regions, blocks_of(frame), "own")
        except TransferError:
            return False
        if span.region.device is not None or lie_together(span, frame.ids):
            return False
        room = receiver.rooms.lend_ahead(len(frame.ids) * frame.num_bytes)
        if room is None:
            return False
        try:
            request = peer.receive_ahead(payload_tag(self._id, frame.number), room.array)
        except TransferError:
            receiver.rooms.give_back(room)
            raise
        self._running.append(_Running(frame, request, room))
        return True

    def _receive_arrived(self, peer: UcxPeer, frame: Data) -> bool:
        """Receives a payload that is here (or, where it waits at its sender, announced): straight into the blocks where
        they lie together. False if it is not."""
        receiver = self._receiver
        num_bytes = receiver.worker.arrived(self._id, frame.number)
        if num_bytes is None:
            return False
        with receiver.inbox.lock:
            landing = receiver.inbox.find(frame.tag)
            span, why = self._span(frame, landing, num_bytes)
            if landing is None or span is None:
                self._settle(peer, frame.number, why)
                self._running.append(_Running(frame, receiver.worker.discard(self._id, frame.number)))
            elif lie_together(span, frame.ids):
                landing.hold()
                into = place(span.address(frame.ids[0]), num_bytes)
                request = receiver.worker.receive(self._id, frame.number, into)
                self._running.append(_Running(frame, request, landing=landing))
                self._finish()  # over TCP, so that nothing is written under the tag once the lock is free
            else:
                room = receiver.rooms.lend(num_bytes)
                request = receiver.worker.receive(self._id, frame.number, room.array)
                self._running.append(_Running(frame, request, room))
        return True

    def _span(self, frame: Data, landing: CountedLanding | None, num_bytes: int) -> tuple[Span | None, str]:
        """Where a payload belongs, or why it belongs nowhere. Under the inbox's lock."""
        if landing is None:
            return None, f"nothing is expected under tag {frame.tag!r}"
        try:
            span = resolve(self._receiver.regions, blocks_of(frame), "own")
        except TransferError as error:
            self._receiver.malformed += 1
            return None, str(error)
        if num_bytes != len(frame.ids) * frame.num_bytes or num_bytes > MAX_MESSAGE_BYTES:
            self._receiver.malformed += 1
            return None, WRONG_SIZE
        if span.region.device is not None and not lie_together(span, frame.ids):
            return None, "blocks that lie apart in a GPU's memory must come one by one"
        why = landing.refusal(frame.region, frame.ids, span)
        return (None if why else span), why

    def _finish(self) -> bool:
        """Counts and answers what has been received; whether there was anything."""
        ended: list[_Running] = []
        still: list[_Running] = []
        for running in self._running:
            (ended if running.request.completed else still).append(running)
        self._running = still
        for running in ended:
            if running.room is not None:
                why = self._put_in_place(running.frame, running.room, failure_of(running.request))
                self._receiver.rooms.give_back(running.room)
            elif running.landing is not None:
                why = self._count(running.frame, running.landing, failure_of(running.request))
            else:
                continue  # has been refused already
            if self._peer is not None:
                self._settle(self._peer, running.frame.number, why)
        return bool(ended)

    def _put_in_place(self, frame: Data, room: Room, why_failed: str) -> str:
        """Scatters what a room holds, if it is still expected; else why it is not."""
        if why_failed:
            return why_failed
        if room.is_short():
            self._receiver.malformed += 1
            return WRONG_SIZE
        with self._receiver.inbox.lock:
            landing = self._receiver.inbox.find(frame.tag)
            span, why = self._span(frame, landing, len(room.memory))
            if landing is not None and span is not None:
                scatter(room.memory, span, frame.ids)
                landing.record(span, frame.ids)
        return why

    def _count(self, frame: Data, landing: CountedLanding, why_failed: str) -> str:
        """What has gone straight into a landing's blocks is counted, if the landing is still open."""
        with self._receiver.inbox.lock:
            why = why_failed
            if not why and self._receiver.inbox.find(frame.tag) is not landing:
                why = f"nothing is expected under tag {frame.tag!r} any more"
            if not why:
                landing.record(resolve(self._receiver.regions, blocks_of(frame), "own"), frame.ids)
            landing.release()
        return why

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
        if len(self._acks) >= ACKS_PER_WORD:
            self._flush(peer)

    def _flush(self, peer: UcxPeer) -> None:
        if self._acks:
            peer.say(Ack(self._acks))
            self._acks = []
        peer.flush()


def blocks_of(frame: Data | Ask) -> Blocks:
    """The part of our memory that a frame names."""
    return Blocks(frame.region, tuple(frame.ids), frame.start, frame.num_bytes)
