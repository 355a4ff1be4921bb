"""Blocks over TCP, where no shared memory or RDMA joins the peers: every byte counted, digested and acknowledged.

    engine's thread                      I/O thread (owns every socket)
    write ──▶ queue ─── eventfd ───▶ ZmqLink: DEALER per peer ──▶ ZmqReceiver: ROUTER ──▶ landing, own regions

Memory model: any memory will do, as long as it stays mapped until `close`. At most WINDOW_BYTES per peer are under
way; the rest of a write is only block numbers in a queue. What strangers send is bounded by the doorway's limits.
Threading: one I/O thread per transport, which never waits for a single peer; a stopped peer fills its own window and
nothing else. A transfer is DONE only when the receiver has said that its bytes are in place. The fence is the
receiver's `Landing.close`, or the end of every transfer; frames under way when an endpoint is closed may still land.
"""

from __future__ import annotations

import collections
import logging
import secrets
import threading
from collections.abc import Sequence
from typing import NamedTuple

import zmq

from core.clock import Clock, SystemClock
from core.errors import ConfigError, TransferError
from transport.address import bind_address
from transport.base import Blocks, Memory, Region
from transport.doorbell import Doorbell
from transport.doorway import CHECK_MS, Doorway
from transport.intake import IntakeLimits
from transport.keys import Keys
from transport.landing import CountedLanding, Inbox
from transport.piecewise_endpoint import PiecewiseEndpoint
from transport.regions import check_region, check_words
from transport.zmq_link import CONNECT_TIMEOUT_S, ZmqLink
from transport.zmq_receiver import ZmqReceiver
from transport.zmq_transfer import ZmqTransfer
from transport.zmq_wire import (
    MAX_FRAMES_IN_FLIGHT,
    MAX_PART_BYTES,
    WINDOW_BYTES,
    RegionShape,
    ZmqDescription,
    decode_description,
    encode,
    shape_region,
)

LIMITS = IntakeLimits(connection_bytes=4 * WINDOW_BYTES, total_bytes=64 * WINDOW_BYTES)
_log = logging.getLogger(__name__)


def make(host: str) -> ZmqTransport:
    """See transport/schemes.py. Raises ConfigError if the host is not ours."""
    return ZmqTransport(host)


def make_encrypted(host: str, keys: Keys) -> ZmqTransport:
    """The same, for holders of the keys alone."""
    return ZmqTransport(host, keys=keys)


def unavailable() -> str:
    """See transport/schemes.py: vLLM itself needs ZMQ."""
    return ""


def is_reachable(description: bytes) -> bool:
    """See transport/schemes.py: only a try will tell."""
    return True


class ZmqTransport:
    """See transport/base.py. `host`: an address of this machine that peers can reach. keys: of the cluster; None:
    nothing is encrypted."""

    def __init__(self, host: str, clock: Clock | None = None, keys: Keys | None = None) -> None:
        self.scheme = "zmq"
        self._clock = clock or SystemClock()
        self._regions: dict[int, Region] = {}
        self._inbox = Inbox()
        self._token = secrets.token_hex(16)
        self._io = _IoThread(_Place(host, keys), self._token, self._regions, self._inbox, self._clock)

    @property
    def malformed(self) -> int:
        """Messages that were dropped because they do not parse or contradict themselves."""
        return self._io.malformed()

    def allocate(self, num_bytes: int) -> Memory | None:
        return None

    def register(self, region: Region) -> None:
        check_region(region, self._regions)
        self._regions[region.id] = region

    def describe(self) -> bytes:
        shapes = [RegionShape(each.id, each.block_bytes, each.num_blocks) for each in self._regions.values()]
        return encode(ZmqDescription(self._io.address, self._token, shapes))

    def connect(self, description: bytes) -> PiecewiseEndpoint[ZmqTransfer]:
        parsed = decode_description(description)
        if not self._io.is_open():
            raise TransferError("the transport is closed")
        remote = {shape.id: shape_region(shape) for shape in parsed.regions}
        link = ZmqLink(parsed, self._clock.monotonic_s() + CONNECT_TIMEOUT_S, self._io.wake)
        self._io.adopt(link)
        return PiecewiseEndpoint(self._regions, remote, link, lambda task: ZmqTransfer(task, link.cancel))

    def expect(self, tag: str, blocks: Sequence[Blocks]) -> CountedLanding:
        check_words(tag, None)
        landing = self._inbox.open(tag, blocks, self._regions)
        self._io.wake()
        return landing

    def close(self) -> None:
        """Ends the I/O thread and every endpoint."""
        self._io.close()


class _Place(NamedTuple):
    """Where a transport listens, and to whom."""

    host: str
    keys: Keys | None


class _IoThread:
    """Owns the sockets of one transport."""

    def __init__(self, place: _Place, token: str, regions: dict[int, Region], inbox: Inbox, clock: Clock) -> None:
        self._clock = clock
        self._keys = place.keys
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 1 << 14)
        try:
            self._doorway = _bind_router(self._context, place)
        except ConfigError:
            self._context.destroy(0)
            raise
        self._receiver = ZmqReceiver(self._doorway, token, regions, inbox)
        self._links: list[ZmqLink] = []
        self._new_links: collections.deque[ZmqLink] = collections.deque()
        self._doorbell = Doorbell()
        self._thread = threading.Thread(target=self._run, name="baton-zmq", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """Where peers connect to."""
        return self._doorway.address

    def is_open(self) -> bool:
        return not self._doorbell.is_closed

    def wake(self) -> None:
        """Makes the thread take a turn."""
        self._doorbell.ring()

    def adopt(self, link: ZmqLink) -> None:
        """Hands a new link to the thread."""
        self._new_links.append(link)
        self._doorbell.ring()

    def malformed(self) -> int:
        return self._receiver.malformed + sum(link.malformed for link in list(self._links))

    def close(self) -> None:
        if self.is_open():
            self._doorbell.close()
            self._thread.join()
            self._doorbell.free()

    def _run(self) -> None:
        poller = zmq.Poller()
        for socket in (self._doorway.listener, *self._doorway.sockets):
            poller.register(socket, zmq.POLLIN)
        poller.register(self._doorbell.fd, zmq.POLLIN)
        while self.is_open():
            is_timed = self._receiver.is_waiting() or self._doorway.has_callers or bool(self._links)
            events = dict(poller.poll(CHECK_MS if is_timed else None))
            self._doorbell.answer()
            try:
                self._turn(poller, events)
            except Exception:  # noqa: BLE001 - one bad message or link must not end the thread that serves all others
                _log.exception("zmq transport: a turn failed")
        for link in [*self._links, *self._new_links]:
            link.fail("the transport is closed")
            link.shut()
        self._doorway.close()
        self._context.destroy(0)

    def _turn(self, poller: zmq.Poller, events: dict[object, int]) -> None:
        now_s = self._clock.monotonic_s()
        while self._new_links:
            self._open(poller, self._new_links.popleft())
        self._receiver.turn(now_s, self._doorway.listener in events)
        self._doorway.turn(any(socket in events for socket in self._doorway.sockets))
        for link in list(self._links):
            if not _turn_link(link, now_s, events):
                poller.unregister(link.line.socket)
                poller.unregister(link.line.monitor.socket)
                self._links.remove(link)
                link.shut()

    def _open(self, poller: zmq.Poller, link: ZmqLink) -> None:
        try:
            link.open(self._context, self._keys)
        except zmq.ZMQError as error:
            link.fail(f"cannot open a connection: {error}")
            link.shut()
            return
        poller.register(link.line.socket, zmq.POLLIN)
        poller.register(link.line.monitor.socket, zmq.POLLIN)
        self._links.append(link)


def _turn_link(link: ZmqLink, now_s: float, events: dict[object, int]) -> bool:
    """False once the link is over; a link whose socket fails is."""
    try:
        return link.turn(now_s, link.line.socket in events, link.line.monitor.socket in events)
    except zmq.ZMQError as error:
        link.fail(f"the connection failed: {error}")
        return False


def _bind_router(context: zmq.Context[zmq.Socket[bytes]], place: _Place) -> Doorway:
    """Raises ConfigError if the host is not ours."""
    address = bind_address(place.host)
    router = context.socket(zmq.ROUTER)
    for option, value in (
        (zmq.LINGER, 0),
        (zmq.ROUTER_MANDATORY, 1),
        (zmq.MAXMSGSIZE, MAX_PART_BYTES),
        (zmq.SNDHWM, 4 * MAX_FRAMES_IN_FLIGHT),
        (zmq.RCVHWM, MAX_FRAMES_IN_FLIGHT),
        (zmq.IPV6, int("[" in address)),
    ):
        router.setsockopt(option, value)
    try:
        return Doorway(context, router, address, LIMITS, place.keys)
    except zmq.ZMQError as error:
        raise ConfigError(f"cannot listen on {place.host!r}: {error}") from error
