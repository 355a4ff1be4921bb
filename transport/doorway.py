"""One listening ZMQ socket's door: who may come in, who was refused and why, and how much strangers may leave there.

    Monitor ──▶ connections opened, refused, ended ──▶ log: cause and remedy, seldom
                                                  └──▶ Intake: bytes per connection
    Doorkeeper ──▶ only the cluster's keys get in, where there are keys

Memory and threading: the owner of the socket polls `sockets`, and calls `turn` at least every CHECK_MS while
`has_callers`.
"""

from __future__ import annotations

import logging
import time

import zmq

from transport.curve import Doorkeeper, secure_listener, why_refused
from transport.intake import Intake, IntakeLimits
from transport.keys import Keys
from transport.monitor import ENDED, OPENED, REFUSED, Monitor
from transport.seldom import Seldom

CHECK_MS = 50
HANDSHAKE_TIMEOUT_MS = 5000
LOG_INTERVAL_S = 5.0
_KEEPALIVE = (
    (zmq.TCP_KEEPALIVE, 1),
    (zmq.TCP_KEEPALIVE_IDLE, 5),
    (zmq.TCP_KEEPALIVE_INTVL, 2),
    (zmq.TCP_KEEPALIVE_CNT, 3),
)
_log = logging.getLogger(__name__)


def keep_alive(socket: zmq.Socket[bytes]) -> None:
    """A peer whose host has vanished is noticed within about ten seconds."""
    for option, value in _KEEPALIVE:
        socket.setsockopt(option, value)


class Doorway:
    """Binds `socket` to `address`, and closes it. Raises zmq.ZMQError if it cannot listen there."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        socket: zmq.Socket[bytes],
        address: str,
        limits: IntakeLimits,
        keys: Keys | None,
    ) -> None:
        self.listener = socket
        self._keys = keys
        self._doorkeeper = Doorkeeper(context, keys) if keys is not None else None
        self._monitor = Monitor(context, socket, OPENED | REFUSED | ENDED)
        secure_listener(socket, keys)
        keep_alive(socket)
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS)
        try:
            socket.bind(address)
        except zmq.ZMQError:
            self.close()
            raise
        self.address: str = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._intake = Intake(int(self.address.rpartition(":")[2]), limits)
        self._refusals = Seldom(LOG_INTERVAL_S)
        self._check_s = 0.0

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        """To be polled beside the listening one."""
        return [self._monitor.socket, *([self._doorkeeper.socket] if self._doorkeeper is not None else [])]

    @property
    def has_callers(self) -> bool:
        """Whether anybody is connected, so that `turn` is due every CHECK_MS."""
        return len(self._intake) > 0

    def took(self, part: zmq.Frame, num_bytes: int, num_parts: int = 1) -> bool:
        """A whole message was taken, of which this is a part that came over the line; False if it is to be dropped."""
        return self._intake.took(part, num_bytes, num_parts)

    def turn(self, is_readable: bool) -> None:
        """Lets in, counts, shuts out, and says so. After what could be received has been. is_readable: one of
        `sockets` is."""
        if is_readable:
            self._hear()
        now_s = time.monotonic()
        if now_s >= self._check_s:
            self._check_s = now_s + CHECK_MS / 1000
            if self._intake.check():
                self._say("shut a connection down: there are too many, or too much was sent at once")

    def close(self) -> None:
        """Closes the listening socket too, before the keeper of its door."""
        self._monitor.close()
        self.listener.close(0)
        if self._doorkeeper is not None:
            self._doorkeeper.close()

    def _hear(self) -> None:
        if self._doorkeeper is not None:
            self._doorkeeper.answer()
        for event in self._monitor.take():
            if event.kind & OPENED:
                self._intake.opened(event.value)
            elif event.kind & REFUSED:
                self._say(f"refused a caller: {why_refused(event.kind, event.value, self._keys)}")
            elif event.kind == zmq.EVENT_DISCONNECTED:
                self._intake.closed(event.value)

    def _say(self, what: str) -> None:
        if self._refusals.is_due(what):
            _log.warning("%s %s", self.address, what)
