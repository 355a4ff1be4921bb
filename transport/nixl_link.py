"""One peer as the writing side's thread sees it: connects, loads its agent, asks for tags, drives the lanes, winds up.

    CONNECTING ──▶ GREETING ──▶ READY ──▶ ENDING ──▶ (removed)
                   Hello sent   Welcome    copies under way may end, CLOSE_GRACE_S at most; then NIXL disconnects, and
                                           only then the connection is closed: the owner takes its end as our fence

Memory model: lanes that have nothing to do are forgotten, oldest first, beyond MAX_LANES; the owner still counts us as
their writer until it asks us to stop.
Threading: the transport's thread, except for the constructor.
"""

from __future__ import annotations

import collections
import enum
import itertools
import secrets
import select
from collections.abc import Callable
from dataclasses import dataclass, field

from core.errors import TransferError
from transport.nixl_agent import NixlPeer
from transport.nixl_lane import Lane, NixlTransfer
from transport.nixl_socket import NixlSocket
from transport.nixl_thread import NixlThread
from transport.nixl_wire import (
    MAX_FRAME_BYTES,
    Busy,
    Heard,
    Hello,
    NixlDescription,
    Opened,
    Opening,
    Refused,
    Shut,
    Stopped,
    ToOwner,
    Welcome,
    decode_to_writer,
    encode,
    metadata_digest,
)
from transport.regions import MAX_TAG_CHARACTERS

CONNECT_TIMEOUT_S = 10.0
CLOSE_GRACE_S = 0.5
QUIET_AFTER_S = 0.002
MAX_LANES = 4096
_MAX_LATER_FRAME_BYTES = 4 * MAX_TAG_CHARACTERS + 4096


class _Phase(enum.Enum):
    CONNECTING = "connecting"
    GREETING = "greeting"
    READY = "ready"
    ENDING = "ending"


@dataclass
class _Lanes:
    """Every lane of one link, least recently used first."""

    link: str
    by_tag: collections.OrderedDict[str | None, Lane] = field(default_factory=collections.OrderedDict)
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def of(self, tag: str | None) -> Lane:
        lane = self.by_tag.get(tag)
        if lane is None:
            lane = self.by_tag[tag] = Lane(tag, self.link, self.numbers)
            for other in list(itertools.islice(self.by_tag, max(len(self.by_tag) - MAX_LANES, 0))):
                if self.by_tag[other].is_idle():
                    del self.by_tag[other]
        self.by_tag.move_to_end(tag)
        return lane

    def all(self) -> list[Lane]:
        return [lane for lane in self.by_tag.values() if not lane.is_idle()]


@dataclass
class _Told:
    """What the owner was told of our being busy. quiet_since_s: when the last copy ended, while it was not told."""

    is_busy: bool = True  # an owner takes a new connection to be busy
    quiet_since_s: float = 0.0


class NixlLink:
    """`on_end`: called once with the reason, when nothing new can be sent any more."""

    def __init__(self, description: NixlDescription, thread: NixlThread, on_end: Callable[[str], None]) -> None:
        self._description = description
        self._thread = thread
        self._on_end = on_end
        self._lanes = _Lanes(secrets.token_hex(8))
        self._told = _Told()
        self._phase = _Phase.CONNECTING
        self._peer: NixlPeer | None = None
        self._opened = _Opened()

    def start(self) -> None:
        """Begins to connect."""
        self._opened.until_s = self._thread.clock.monotonic_s() + CONNECT_TIMEOUT_S
        self._thread.add(self)
        try:
            self._opened.socket = NixlSocket.connecting(self._description.address, MAX_FRAME_BYTES)
        except TransferError as error:
            self.end(str(error))
            return
        self._thread.watch(self._opened.socket.fileno(), select.EPOLLOUT, self._hear)

    def add(self, transfer: NixlTransfer) -> None:
        """One transfer more."""
        self._lanes.of(transfer.copy.tag).add(transfer)

    def is_busy(self) -> bool:
        return self._phase is _Phase.ENDING or (
            self._phase is _Phase.READY and (self._told.is_busy or any(lane.has_work() for lane in self._lanes.all()))
        )

    def end(self, why: str) -> None:
        if self._phase is _Phase.ENDING:
            return
        self._phase = _Phase.ENDING
        self._opened.until_s = self._thread.clock.monotonic_s() + CLOSE_GRACE_S
        self._on_end(why)
        for lane in self._lanes.by_tag.values():
            lane.shut(why)

    def turn(self, now_s: float) -> bool:
        try:
            has_moved = self._turn(now_s)
        except TransferError as error:
            self._break_off()
            self.end(str(error))
            self._opened.until_s = now_s
            has_moved = True
        if self._phase is _Phase.ENDING and (now_s >= self._opened.until_s or not self._is_moving()):
            self._remove()
        return has_moved

    def _turn(self, now_s: float) -> bool:
        if self._phase in (_Phase.CONNECTING, _Phase.GREETING):
            if now_s >= self._opened.until_s:
                self.end(f"the peer at {self._description.address} did not answer within {CONNECT_TIMEOUT_S:.0f} s")
            elif self._opened.metadata is not None:
                self._load(self._opened.metadata)
            return False
        peer = self._peer
        if peer is None:
            return False
        has_moved = False
        for lane in self._lanes.all():
            if not lane.is_granted and not lane.is_asked and lane.tag is not None and not lane.why_shut:
                lane.is_asked = True
                self._say(Opening(lane.tag))
            if lane.has_work() and not self._told.is_busy and self._phase is _Phase.READY:
                self._told.is_busy = True
                self._say(Busy(True))
            has_moved = lane.advance(self._thread.agent, peer) or has_moved
        self._settle(now_s)
        return has_moved

    def _settle(self, now_s: float) -> None:
        """Reports lanes that have stopped, and a link that has become quiet."""
        if self._phase is not _Phase.READY:
            return
        for tag in [tag for tag, lane in self._lanes.by_tag.items() if lane.why_shut and lane.is_idle()]:
            del self._lanes.by_tag[tag]
            self._say(Stopped(tag or ""))
        if self._is_moving() or not self._told.is_busy:
            self._told.quiet_since_s = now_s
        elif now_s - self._told.quiet_since_s > QUIET_AFTER_S:
            self._told.is_busy = False
            self._say(Busy(False))

    def _is_moving(self) -> bool:
        return any(lane.is_moving() for lane in self._lanes.by_tag.values())

    def _hear(self, mask: int) -> None:
        connection = self._opened.socket
        if connection is None or self._opened.is_closed:
            return
        try:
            if self._phase is _Phase.CONNECTING:
                self._greet(connection)
            else:
                if mask & select.EPOLLOUT:
                    connection.flush()
                for body in connection.receive():
                    self._obey(connection, body)
            self._watch(connection)
        except TransferError as error:
            self._thread.forget(connection.fileno())
            self._opened.is_closed = True
            self._break_off()
            self.end(self._opened.explain(str(error)))

    def _greet(self, connection: NixlSocket) -> None:
        why = connection.connect_error()
        if why:
            raise TransferError(f"cannot connect to the peer at {self._description.address}: {why}")
        self._phase = _Phase.GREETING
        connection.send(encode(Hello(self._description.token, self._lanes.link, self._description.metadata_digest)))

    def _watch(self, connection: NixlSocket) -> None:
        events = select.EPOLLIN | (select.EPOLLOUT if connection.wants_to_write() else 0)
        self._thread.watch(connection.fileno(), events, self._hear)

    def _obey(self, connection: NixlSocket, body: bytes) -> None:
        frame = decode_to_writer(body)
        if isinstance(frame, Welcome) and self._opened.metadata is None:
            if metadata_digest(frame.metadata) != self._description.metadata_digest:
                raise TransferError("the peer's agent is not the one that was described")
            self._opened.metadata = frame.metadata
            connection.limit(_MAX_LATER_FRAME_BYTES)
        elif isinstance(frame, Opened):
            self._lanes.of(frame.tag).is_granted = True
        elif isinstance(frame, Refused | Shut):
            lane = self._lanes.of(frame.tag)
            lane.is_granted = False
            lane.shut(frame.why if isinstance(frame, Refused) else "the receiver closed the landing")
        elif isinstance(frame, Heard):
            for lane in self._lanes.all():
                lane.heard(frame.number)
        else:
            raise TransferError("the peer does not keep to the protocol")

    def _load(self, metadata: bytes) -> None:
        self._peer = self._thread.agent.add_peer(metadata, self._description.agent)
        if self._peer is not None and self._phase is _Phase.GREETING:
            self._phase = _Phase.READY

    def _say(self, frame: ToOwner) -> None:
        connection = self._opened.socket
        if connection is None or self._opened.is_closed:
            return
        connection.send(encode(frame))
        self._watch(connection)

    def _break_off(self) -> None:
        """The peer's agent cannot be used by anybody any more."""
        if self._peer is not None:
            self._peer.is_broken = True

    def _remove(self) -> None:
        """Nothing of ours is under way any more, or it is abandoned."""
        if self._is_moving():
            self._break_off()
        for lane in self._lanes.by_tag.values():
            lane.abandon(self._thread.agent)
        if self._peer is not None:
            self._peer.close()
        connection = self._opened.socket
        if connection is not None:
            self._thread.forget(connection.fileno())
            connection.close()
        self._thread.remove(self)


@dataclass
class _Opened:
    """The connection, and until when its present phase may last. metadata: the owner's agent, once it is checked."""

    socket: NixlSocket | None = None
    until_s: float = 0.0
    metadata: bytes | None = None
    is_closed: bool = False

    def explain(self, why: str) -> str:
        """A peer that hangs up on our first words is not the one that was described."""
        if self.metadata is None and "hung up" in why:
            return f"{why} on our greeting: it was restarted, or is another one than described"
        return why
