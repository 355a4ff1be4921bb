"""The payloads of one connection on their way in: asked for, received, put in place, counted.

    frame ──▶ blocks lie apart: into a room asked for ahead (transport/ucx_rooms.py), and from there into the blocks
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
from transport.frames import Data
from transport.landing import CountedLanding
from transport.pieces import lie_together, scatter
from transport.regions import Span, resolve
from transport.ucx_receiver import UcxReceiver, blocks_of
from transport.ucx_rooms import Room
from transport.ucx_wire import MAX_MESSAGE_BYTES, payload_tag
from transport.ucx_worker import UcxPeer, failure_of, place

MAX_RUNNING = 16
WRONG_SIZE = "the payload has another size than its frame says"


class Settled(NamedTuple):
    """What became of a frame. why_not: why its payload is not in place; empty if it is."""

    number: int
    why_not: str


class _Running(NamedTuple):
    """A payload that is being received: into a room, or straight into a landing's blocks, or away (why_refused)."""

    frame: Data
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

    def begin(self, peer: UcxPeer, frame: Data) -> bool:
        """Begins to receive a payload; False if it must wait. Raises TransferError if UCX refuses."""
        if len(self._running) >= MAX_RUNNING:
            return False
        return self._receive_ahead(peer, frame) or self._receive_arrived(frame)

    def take_settled(self) -> list[Settled]:
        """What has been received, or refused, since the last call."""
        self._finish()
        settled, self._settled = self._settled, []
        return settled

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

    def _receive_arrived(self, frame: Data) -> bool:
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
                request = receiver.worker.discard(self._id, frame.number)
                self._running.append(_Running(frame, request, why_refused=why))
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
                why = self._put_in_place(running.frame, running.room, failure_of(running.request))
                self._receiver.rooms.give_back(running.room)
            elif running.landing is not None:
                why = self._count(running.frame, running.landing, failure_of(running.request))
            self._settled.append(Settled(running.frame.number, why))

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
