"""The control plane's sockets: one PULL for everyone's words, one PUSH per peer spoken to.

    any thread: send(peer, message) ──▶ PUSH per peer (lock) ══ tcp ══▶ PULL ──▶ one thread: on_envelope
                                        └─ monitor, read every 50 ms ──────────▶ on_peer_lost, on_tick

Memory model: bounded by the sockets' queues, MAX_MESSAGE_BYTES per message and MAX_PEERS sockets (the one used least
lately is closed). Nothing received is kept.
Threading: sockets to peers and their monitors are touched under one lock only, by whoever sends and by the thread; the
PULL socket is the thread's alone. Callbacks run on the thread, without the lock, and must not wait; what they raise is
logged.
"""

from __future__ import annotations

import collections
import functools
import logging
import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import parse_monitor_message

from core.clock import Clock, SystemClock
from core.errors import ConfigError, ProtocolError
from core.handoff import Peer
from transport.address import bind_address, is_address
from transport.messages import MAX_MESSAGE_BYTES, Envelope, Message, decode_envelope, encode

MAX_PEERS = 1024
MAX_QUEUED_MESSAGES = 10_000
MESSAGES_PER_TURN = 256
TICK_S = 0.05
_LOST = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_CONNECT_RETRIED
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identity:
    """Who speaks: what every envelope says of its sender, but the address."""

    name: str
    boot_id: str
    fingerprint: str
    num_ranks: int = 1


@dataclass(frozen=True)
class Callbacks:
    """on_envelope: a message came; its body is not decoded yet. on_peer_lost: the connection to this control address
    broke or could not be made. on_tick: every 50 ms."""

    on_envelope: Callable[[Envelope], None]
    on_peer_lost: Callable[[str], None] = lambda address: None
    on_tick: Callable[[], None] = lambda: None


class ControlPlane:
    """Listens from construction until `close`: callbacks may come before the constructor has returned.

    Raises ConfigError if it cannot listen on this host. `peer` is how others name and reach us.
    """

    def __init__(self, host: str, identity: Identity, callbacks: Callbacks, clock: Clock | None = None) -> None:
        self._fingerprint = identity.fingerprint
        self._callbacks = callbacks
        self._clock = clock or SystemClock()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 8 * MAX_PEERS)
        self._pull = self._listen(host)
        address = self._pull.getsockopt_string(zmq.LAST_ENDPOINT)
        self.peer = Peer(identity.name, address, identity.boot_id, identity.num_ranks)
        self._peers = _PeerSockets(self._context)
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.malformed = 0
        self.unsent = 0
        self._thread = threading.Thread(target=self._run, name="baton-control", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """Where peers send to."""
        return self.peer.control

    def send(self, peer: Peer, message: Message) -> bool:
        """Queues a message without waiting; False if the peer's queue is full or this plane is closed.

        Raises ProtocolError if the peer's address is none.
        """
        if not is_address(peer.control):
            raise ProtocolError(f"{peer.control!r} is no control address of the form tcp://host:port")
        sent = self._peers.send(peer.control, encode(message, self.peer, self._fingerprint))
        if not sent:
            self.unsent += 1
        return sent

    def forget(self, peer: Peer) -> None:
        """Closes the socket to a peer; what it has not taken yet is dropped."""
        self._peers.forget(peer.control)

    def close(self) -> None:
        """Ends the thread and closes every socket."""
        if not self._peers.close():
            return
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join()
        os.close(self._stop_fd)
        self._pull.close(0)
        self._context.destroy(0)

    def _listen(self, host: str) -> zmq.Socket[bytes]:
        try:
            address = bind_address(host)
            pull = self._context.socket(zmq.PULL)
            pull.setsockopt(zmq.LINGER, 0)
            pull.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
            pull.setsockopt(zmq.IPV6, int("[" in address))
            pull.bind(address)
        except (ConfigError, zmq.ZMQError) as error:
            self._context.destroy(0)
            raise ConfigError(f"cannot listen on {host!r}: {error}") from error
        return pull

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._pull, zmq.POLLIN)
        poller.register(self._stop_fd, zmq.POLLIN)
        tick_s = self._clock.monotonic_s() + TICK_S
        while True:
            wait_s = min(max(tick_s - self._clock.monotonic_s(), 0.0), TICK_S)
            events = dict(poller.poll(math.ceil(wait_s * 1000)))
            if self._stop_fd in events:
                return
            if self._pull in events:
                self._receive()
            if self._clock.monotonic_s() >= tick_s:
                tick_s = self._clock.monotonic_s() + TICK_S
                self._tick()

    def _receive(self) -> None:
        for _ in range(MESSAGES_PER_TURN):
            try:
                part = self._pull.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            wire, is_single = part.bytes, not part.more
            while part.more:
                part = self._pull.recv(zmq.NOBLOCK, copy=False)
            envelope = _decode(wire) if is_single else None
            if envelope is None:
                self.malformed += 1
            else:
                self._call(functools.partial(self._callbacks.on_envelope, envelope))

    def _tick(self) -> None:
        for address in self._peers.take_lost():
            self._call(functools.partial(self._callbacks.on_peer_lost, address))
        self._call(self._callbacks.on_tick)

    def _call(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception:  # noqa: BLE001 - a fault over one hand-off must not end the thread that serves all
            _log.exception("control plane: a callback failed")


def _decode(wire: bytes) -> Envelope | None:
    """None if it is no envelope; nesting too deep to decode is none either."""
    try:
        return decode_envelope(wire)
    except (ProtocolError, RecursionError):
        return None


class _PeerSockets:
    """One PUSH socket per address, least lately used first, with its monitor. Every method takes the lock."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._sockets: collections.OrderedDict[str, tuple[zmq.Socket[bytes], zmq.Socket[bytes]]]
        self._sockets = collections.OrderedDict()
        self._is_closed = False

    def send(self, address: str, wire: bytes) -> bool:
        with self._lock:
            if self._is_closed:
                return False
            try:
                if address not in self._sockets:
                    self._open(address)
                self._sockets.move_to_end(address)
                self._sockets[address][0].send(wire, zmq.NOBLOCK)
            except zmq.ZMQError:  # EAGAIN: the queue is full; otherwise the system refuses a socket
                return False
        return True

    def take_lost(self) -> list[str]:
        """Addresses whose connection broke since the last call; their sockets are closed."""
        with self._lock:
            lost = [address for address, (_, monitor) in self._sockets.items() if _has_event(monitor)]
            for address in lost:
                self._close(address)
        return lost

    def forget(self, address: str) -> None:
        with self._lock:
            if address in self._sockets:
                self._close(address)

    def close(self) -> bool:
        """False if it was closed already."""
        with self._lock:
            was_closed, self._is_closed = self._is_closed, True
            for address in list(self._sockets):
                self._close(address)
        return not was_closed

    def _open(self, address: str) -> None:
        while len(self._sockets) >= MAX_PEERS:
            self._close(next(iter(self._sockets)))
        push = self._context.socket(zmq.PUSH)
        try:
            push.setsockopt(zmq.LINGER, 0)
            push.setsockopt(zmq.SNDHWM, MAX_QUEUED_MESSAGES)
            push.setsockopt(zmq.IPV6, int("[" in address))
            push.setsockopt(zmq.TCP_KEEPALIVE, 1)
            push.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 5)
            push.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 2)
            push.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
            self._sockets[address] = (push, push.get_monitor_socket(_LOST))
            push.connect(address)
        except zmq.ZMQError:
            if address in self._sockets:
                self._close(address)
            push.close(0)
            raise

    def _close(self, address: str) -> None:
        push, monitor = self._sockets.pop(address)
        push.disable_monitor()
        monitor.close(0)
        push.close(0)


def _has_event(monitor: zmq.Socket[bytes]) -> bool:
    try:
        return bool(parse_monitor_message(monitor.recv_multipart(zmq.NOBLOCK))["event"] & _LOST)
    except zmq.Again:
        return False
