"""The control plane's sockets: one PULL for everyone's words, one PUSH per peer spoken to.

    any thread: send(peer, message) ──▶ PUSH per peer (lock) ══ tcp ══▶ PULL ──▶ one thread: on_envelope
                                        └─ monitor, read every 50 ms ──────────▶ on_peer_lost, on_tick

Memory model: bounded by the sockets' queues, MAX_MESSAGE_BYTES per message, MAX_PEERS sockets (the one used least
lately is closed; transport/outbox.py) and the doorway's limits. Nothing received is kept.
Threading: sockets to peers and their monitors are touched under one lock only, by whoever sends and by the thread; the
PULL socket is the thread's alone. Callbacks run on the thread, without the lock, and must not wait; what they raise is
logged.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

import zmq

from core.clock import Clock, SystemClock
from core.errors import ConfigError, ProtocolError
from core.handoff import Peer
from transport.address import bind_address, is_address
from transport.doorway import Doorway
from transport.intake import IntakeLimits
from transport.keys import Keys
from transport.messages import MAX_MESSAGE_BYTES, Envelope, Message, decode_envelope, encode
from transport.outbox import MAX_PEERS, Outbox
from transport.seldom import Seldom

MESSAGES_PER_TURN = 256
MAX_UNREAD_MESSAGES = 8
"""Of one connection, in libzmq's queue; behind them the connection itself waits."""

TICK_S = 0.05
LOG_INTERVAL_S = 5.0
LIMITS = IntakeLimits(connection_bytes=4 * MAX_MESSAGE_BYTES, total_bytes=64 * MAX_MESSAGE_BYTES)
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

    Raises ConfigError if it cannot listen on this host. `peer` is how others name and reach us. keys: only who has them
    is heard and spoken to, encrypted.
    """

    def __init__(
        self,
        host: str,
        identity: Identity,
        callbacks: Callbacks,
        clock: Clock | None = None,
        keys: Keys | None = None,
    ) -> None:
        self._fingerprint = identity.fingerprint
        self._callbacks = callbacks
        self._clock = clock or SystemClock()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 8 * MAX_PEERS)
        self._pull, self._doorway = self._listen(host, keys)
        self.peer = Peer(identity.name, self._doorway.address, identity.boot_id, identity.num_ranks)
        self._peers = Outbox(self._context, keys)
        self._losses = Seldom(LOG_INTERVAL_S)
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
        self._doorway.close()
        self._context.destroy(0)

    def _listen(self, host: str, keys: Keys | None) -> tuple[zmq.Socket[bytes], Doorway]:
        try:
            address = bind_address(host)
            pull = self._context.socket(zmq.PULL)
            pull.setsockopt(zmq.LINGER, 0)
            pull.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
            pull.setsockopt(zmq.RCVHWM, MAX_UNREAD_MESSAGES)
            pull.setsockopt(zmq.IPV6, int("[" in address))
            return pull, Doorway(self._context, pull, address, LIMITS, keys)
        except (ConfigError, zmq.ZMQError) as error:
            self._context.destroy(0)
            raise ConfigError(f"cannot listen on {host!r}: {error}") from error

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._pull, zmq.POLLIN)
        poller.register(self._stop_fd, zmq.POLLIN)
        for socket in self._doorway.sockets:
            poller.register(socket, zmq.POLLIN)
        tick_s = self._clock.monotonic_s() + TICK_S
        while True:
            wait_s = min(max(tick_s - self._clock.monotonic_s(), 0.0), TICK_S)
            events = dict(poller.poll(math.ceil(wait_s * 1000)))
            if self._stop_fd in events:
                return
            try:
                self._turn(events)
            except Exception:  # noqa: BLE001 - one bad message must not end the thread that serves everybody
                _log.exception("control plane: a turn failed")
            if self._clock.monotonic_s() >= tick_s:
                tick_s = self._clock.monotonic_s() + TICK_S
                self._tick()

    def _turn(self, events: dict[object, int]) -> None:
        if self._pull in events:
            self._receive()
        self._doorway.turn(any(socket in events for socket in self._doorway.sockets))

    def _receive(self) -> None:
        for _ in range(MESSAGES_PER_TURN):
            try:
                part = self._pull.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            wire, is_single, num_bytes, num_parts = part.bytes, not part.more, len(part), 1
            while part.more:
                part = self._pull.recv(zmq.NOBLOCK, copy=False)
                num_bytes, num_parts = num_bytes + len(part), num_parts + 1
            is_known = self._doorway.took(part, num_bytes, num_parts)
            envelope = _decode(wire) if is_single and is_known else None
            if envelope is None:
                self.malformed += 1
            else:
                self._call(functools.partial(self._callbacks.on_envelope, envelope))

    def _tick(self) -> None:
        for address, why in self._peers.take_lost():
            if why and self._losses.is_due(address + why):
                _log.warning("the control plane cannot speak to %s: %s", address, why)
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
