"""The receiving side of the zmq transport: checks every frame, puts it in place, answers it. Driven by the I/O thread.

    frame ──▶ malformed? dropped and counted      unknown tag? parked, 2 s at most      else applied, Ack or Nack

Memory model: a frame is copied into the landing's blocks under the inbox's lock. Parked frames are bounded in bytes
and number; nothing else is kept from the network but the names of connections that knew the token.
Threading: the I/O thread alone; the inbox is shared with the engine's thread under its lock.
"""

from __future__ import annotations

import collections
import contextlib
import hmac
from collections.abc import Mapping
from typing import NamedTuple

import zmq

from core.errors import TransferError
from transport.base import Blocks, Region
from transport.doorway import Doorway
from transport.landing import Inbox
from transport.parking import PARKING_TIMEOUT_S, Parking
from transport.regions import resolve
from transport.zmq_transfer import gather, scatter
from transport.zmq_wire import (
    FRAME_BYTES,
    MAX_FRAMES_IN_FLIGHT,
    WINDOW_BYTES,
    Ack,
    Answer,
    Ask,
    Data,
    Hello,
    Nack,
    Notice,
    ToSender,
    Welcome,
    decode_to_receiver,
    encode,
)

MAX_PEERS = 4096
MESSAGES_PER_TURN = 64
MAX_UNANSWERED_BYTES = WINDOW_BYTES // 8
"""Within a turn: a sender whose window is full waits for the answers."""
_PARKED_COST_BYTES = 512


class _Parked(NamedTuple):
    """A frame whose tag is not expected yet."""

    identity: bytes
    frame: Data | Notice
    payload: zmq.Frame | None
    until_s: float

    @property
    def tag(self) -> str:
        return self.frame.tag

    def cost(self) -> int:
        return _PARKED_COST_BYTES + (len(self.payload) if self.payload is not None else 0)


class ZmqReceiver:
    """Everything that arrives at one ROUTER."""

    def __init__(self, doorway: Doorway, token: str, regions: Mapping[int, Region], inbox: Inbox) -> None:
        self._doorway = doorway
        self._router = doorway.listener
        self._token = token.encode()
        self._regions = regions
        self._inbox = inbox
        self._peers: collections.OrderedDict[bytes, None] = collections.OrderedDict()
        self._parking: Parking[_Parked] = Parking()
        self._acks: dict[bytes, list[int]] = {}
        self.malformed = 0

    def is_waiting(self) -> bool:
        """Whether frames are parked: their time limit needs a turn without a message."""
        return bool(self._parking.by_tag)

    def turn(self, now_s: float, is_readable: bool) -> None:
        """Takes some messages, applies what was parked for tags that are expected now, answers."""
        self._unpark(now_s)
        if is_readable:
            num_bytes = 0
            for _ in range(MESSAGES_PER_TURN):
                parts = self._next_message()
                if parts is None:
                    break
                if not self._handle(parts, now_s):
                    self.malformed += 1
                num_bytes += sum(map(len, parts))
                if num_bytes > MAX_UNANSWERED_BYTES:
                    num_bytes = 0
                    self._send_acks()
        self._send_acks()

    def _send_acks(self) -> None:
        for identity, numbers in self._acks.items():
            self._reply(identity, Ack(numbers))
        self._acks.clear()

    def _next_message(self) -> list[zmq.Frame] | None:
        """At most three parts of the next message; None if there is none. More parts are dropped as they come."""
        parts: list[zmq.Frame] = []
        try:
            part = self._router.recv(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        parts.append(part)
        num_bytes, num_parts = 0, 0
        while part.more:
            part = self._router.recv(zmq.NOBLOCK, copy=False)
            num_bytes, num_parts = num_bytes + len(part), num_parts + 1
            if len(parts) < 4:
                parts.append(part)
        if not num_parts:  # only the first part, the connection's name, which did not come over the line
            return parts
        return parts if self._doorway.took(part, num_bytes, num_parts) else parts[:1]

    def _handle(self, parts: list[zmq.Frame], now_s: float) -> bool:
        """False if the message is malformed."""
        if len(parts) not in (2, 3):
            return False
        identity, payload = parts[0].bytes, parts[2] if len(parts) == 3 else None
        frame = decode_to_receiver(parts[1].buffer)
        if isinstance(frame, Hello):
            return self._welcome(identity, frame)
        if frame is None or identity not in self._peers:
            return False
        self._peers.move_to_end(identity)
        if isinstance(frame, Ask):
            return self._answer(identity, frame)
        if isinstance(frame, Data) != (payload is not None):
            self._reply(identity, Nack(frame.number, "malformed"))
            return False
        if frame.tag in self._parking.by_tag:
            self._park(_Parked(identity, frame, payload, now_s + PARKING_TIMEOUT_S))
            return True
        with self._inbox.lock:
            is_early = self._inbox.find(frame.tag) is None and not self._inbox.was_closed(frame.tag)
            if not is_early:
                return self._apply(identity, frame, payload)
        self._park(_Parked(identity, frame, payload, now_s + PARKING_TIMEOUT_S))
        return True

    def _welcome(self, identity: bytes, hello: Hello) -> bool:
        if not hmac.compare_digest(hello.token.encode(), self._token):
            return False
        self._peers[identity] = None
        while len(self._peers) > MAX_PEERS:
            self._peers.popitem(last=False)
        self._reply(identity, Welcome())
        return True

    def _apply(self, identity: bytes, frame: Data | Notice, payload: zmq.Frame | None) -> bool:
        """Under the inbox's lock. False if the frame contradicts itself or our regions."""
        landing = self._inbox.find(frame.tag)
        why, is_sound = "", True
        if landing is None:
            why = f"nothing is expected under tag {frame.tag!r}"
        elif isinstance(frame, Notice):
            why = "" if landing.notify(frame.notice) else "too many notices wait"
        elif payload is not None:
            try:
                span = resolve(self._regions, blocks_of(frame), "own")
                why = landing.refusal(frame.region, frame.ids, span)
            except TransferError as error:
                why, is_sound = str(error), False
            if len(payload) != len(frame.ids) * frame.num_bytes:
                why, is_sound = "the payload has another size than its header says", False
            if not why:
                scatter(payload, span, frame.ids)
                landing.record(span, frame.ids)
        if why:
            self._reply(identity, Nack(frame.number, why))
        else:
            self._ack(identity, frame.number)
        return is_sound

    def _answer(self, identity: bytes, ask: Ask) -> bool:
        try:
            span = resolve(self._regions, blocks_of(ask), "own")
        except TransferError as error:
            self._reply(identity, Nack(ask.number, str(error)))
            return False
        if len(ask.ids) * span.num_bytes > FRAME_BYTES:
            self._reply(identity, Nack(ask.number, "more than one frame was asked for"))
            return False
        self._reply(identity, Answer(ask.number), bytes(gather(span, ask.ids)))
        return True

    def _park(self, parked: _Parked) -> None:
        if not self._parking.add(parked):
            self._reply(parked.identity, Nack(parked.frame.number, "too much came before it was expected"))

    def _unpark(self, now_s: float) -> None:
        for tag in list(self._parking.by_tag):
            with self._inbox.lock:
                is_known = self._inbox.find(tag) is not None or self._inbox.was_closed(tag)
            if is_known or self._parking.by_tag[tag][0].until_s < now_s:
                for parked in self._parking.take(tag):
                    with self._inbox.lock:
                        if not self._apply(parked.identity, parked.frame, parked.payload):
                            self.malformed += 1

    def _ack(self, identity: bytes, number: int) -> None:
        numbers = self._acks.setdefault(identity, [])
        numbers.append(number)
        if len(numbers) >= MAX_FRAMES_IN_FLIGHT:
            self._reply(identity, Ack(self._acks.pop(identity)))

    def _reply(self, identity: bytes, frame: ToSender, *payload: bytes) -> None:
        # Not sent: the peer is gone, or has more frames unanswered than any peer of ours ever has.
        with contextlib.suppress(zmq.ZMQError):
            self._router.send_multipart([identity, encode(frame), *payload], zmq.NOBLOCK)


def blocks_of(frame: Data | Ask) -> Blocks:
    """The part of our memory that a frame names."""
    return Blocks(frame.region, tuple(frame.ids), frame.start, frame.num_bytes)
