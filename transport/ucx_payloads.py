"""The payloads of one connection on their way in: asked for, received, put in place, counted.

    parcel ──▶ blocks lie apart: into a room asked for ahead (transport/ucx_rooms.py), and from there into the blocks
           ──▶ they lie together: once the payload is here, straight from UCX's memory into the blocks
           ──▶ nobody wants it: received and thrown away

Memory model: a room belongs to nobody's blocks, so a landing may close while one is being filled; what came is put in
place only if the landing is still open then, under the inbox's lock. A payload that goes straight into the blocks is
here whole before it is received (TCP), which is one copy under that lock; RDMA and GPU memory are written by the
library itself, and such a receive is held in its landing until it has ended.
Threading: the I/O thread alone; the inbox is shared with the engine's thread under its lock.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from core.errors import TransferError
from transport.landing import CountedLanding
from transport.pieces import lie_together, scatter
from transport.regions import Span, resolve
from transport.ucx_receiver import UcxReceiver, blocks_of
from transport.ucx_rooms import Room
from transport.ucx_wire import MAX_MESSAGE_BYTES, Parcel, payload_tag
from transport.ucx_worker import UcxPeer, failure_of, place

MAX_RUNNING = 16
WRONG_SIZE = "the payload has another size than its parcel says"


class Settled(NamedTuple):
    """What became of a parcel or a notice. why_not: why its payload is not in place; empty if it is."""

    number: int
    why_not: str


class _Running(NamedTuple):
    """A payload that is being received: into a room, or straight into a landing's blocks, or away (why_refused)."""

    parcel: Parcel
    request: Any
    room: Room | None = None
    landing: CountedLanding | None = None
    why_refused: str = ""


class UcxPayloads:
    """Of one connection. id_: under which its peer writes to us."""

    def __init__(self, receiver: UcxReceiver, id_: int) -> None:
        self._receiver = receiver
        self._id = id_
        self._running: list[_Running] = []
        self._settled: list[Settled] = []

    def is_empty(self) -> bool:
        """Whether nothing is being received."""
        return not self._running

    def requests(self) -> list[Any]:
        """The library's, of what is being received."""
        return [running.request for running in self._running]

    def begin(self, peer: UcxPeer, parcel: Parcel) -> bool:
        """Begins to receive a payload; False if it must wait. Raises TransferError if UCX refuses."""
        if len(self._running) >= MAX_RUNNING:
            return False
        return self._receive_ahead(peer, parcel) or self._receive_arrived(parcel)

    def take_settled(self) -> list[Settled]:
        """What has been received, or refused, since the last call."""
        self._finish()
        settled, self._settled = self._settled, []
        return settled

    def _receive_ahead(self, peer: UcxPeer, parcel: Parcel) -> bool:
        """Asks for a payload that may not be here yet, if it is one for a room. Raises TransferError if UCX refuses."""
        receiver = self._receiver
        if not receiver.worker.is_tcp_alone:
            return False
        try:
            spans = self._resolved(parcel)
        except TransferError:
            return False
        if any(span.region.device is not None for span in spans) or _goes_straight(parcel, spans):
            return False
        room = receiver.rooms.lend_ahead(parcel.size())
        if room is None:
            return False
        try:
            request = peer.receive_ahead(payload_tag(self._id, parcel.number), room.array)
        except TransferError:
            receiver.rooms.give_back(room)
            raise
        self._running.append(_Running(parcel, request, room))
        return True

    def _receive_arrived(self, parcel: Parcel) -> bool:
        """Receives a payload that is here (or, where it waits at its sender, announced): straight into the blocks where
        they lie together. False if it is not."""
        receiver = self._receiver
        num_bytes = receiver.worker.arrived(self._id, parcel.number)
        if num_bytes is None:
            return False
        with receiver.inbox.lock:
            landing = receiver.inbox.find(parcel.tag)
            spans, why = self._spans(parcel, landing, num_bytes)
            if landing is None or not spans:
                request = receiver.worker.discard(self._id, parcel.number)
                self._running.append(_Running(parcel, request, why_refused=why))
            elif _goes_straight(parcel, spans):
                landing.hold()
                into = place(spans[0].address(parcel.parts[0].ids[0]), num_bytes)
                request = receiver.worker.receive(self._id, parcel.number, into)
                self._running.append(_Running(parcel, request, landing=landing))
                self._finish()  # over TCP, so that nothing is written under the tag once the lock is free
            else:
                room = receiver.rooms.lend(num_bytes)
                request = receiver.worker.receive(self._id, parcel.number, room.array)
                self._running.append(_Running(parcel, request, room))
        return True

    def _resolved(self, parcel: Parcel) -> list[Span]:
        """Where its parts belong. Raises TransferError if one lies outside of our regions."""
        return [resolve(self._receiver.regions, blocks_of(part), "own") for part in parcel.parts]

    def _spans(self, parcel: Parcel, landing: CountedLanding | None, num_bytes: int) -> tuple[list[Span], str]:
        """Where the parts of a payload belong, or none and why it belongs nowhere. Under the inbox's lock."""
        if landing is None:
            return [], f"nothing is expected under tag {parcel.tag!r}"
        try:
            spans = self._resolved(parcel)
        except TransferError as error:
            self._receiver.malformed += 1
            return [], str(error)
        if num_bytes != parcel.size() or num_bytes > MAX_MESSAGE_BYTES:
            self._receiver.malformed += 1
            return [], WRONG_SIZE
        for part, span in zip(parcel.parts, spans, strict=True):
            if span.region.device is not None and not _goes_straight(parcel, spans):
                return [], "blocks that lie apart in a GPU's memory must come one by one"
            if why := landing.refusal(part.region, part.ids, span):
                return [], why
        return spans, ""

    def _finish(self) -> None:
        """Puts in place and counts what has been received."""
        ended: list[_Running] = []
        still: list[_Running] = []
        for running in self._running:
            (ended if running.request.completed else still).append(running)
        self._running = still
        for running in ended:
            why = running.why_refused
            if running.room is not None:
                why = self._put_in_place(running.parcel, running.room, failure_of(running.request))
                self._receiver.rooms.give_back(running.room)
            elif running.landing is not None:
                why = self._count(running.parcel, running.landing, failure_of(running.request))
            self._settled.append(Settled(running.parcel.number, why))

    def _put_in_place(self, parcel: Parcel, room: Room, why_failed: str) -> str:
        """Scatters what a room holds, if it is still expected; else why it is not."""
        if why_failed:
            return why_failed
        if room.is_short():
            self._receiver.malformed += 1
            return WRONG_SIZE
        with self._receiver.inbox.lock:
            landing = self._receiver.inbox.find(parcel.tag)
            spans, why = self._spans(parcel, landing, len(room.memory))
            if landing is not None and spans:
                first = 0
                for part, span in zip(parcel.parts, spans, strict=True):
                    scatter(room.memory[first : first + part.size()], span, part.ids)
                    landing.record(span, part.ids)
                    first += part.size()
        return why

    def _count(self, parcel: Parcel, landing: CountedLanding, why_failed: str) -> str:
        """What has gone straight into a landing's blocks is counted, if the landing is still open."""
        with self._receiver.inbox.lock:
            why = why_failed
            if not why and self._receiver.inbox.find(parcel.tag) is not landing:
                why = f"nothing is expected under tag {parcel.tag!r} any more"
            if not why:
                for part, span in zip(parcel.parts, self._resolved(parcel), strict=True):
                    landing.record(span, part.ids)
            landing.release()
        return why


def _goes_straight(parcel: Parcel, spans: list[Span]) -> bool:
    """Whether the payload is consecutive in our memory."""
    return len(spans) == 1 and lie_together(spans[0], parcel.parts[0].ids)
