"""The ZMQ socket that askers connect to.

    askers (DEALER) ══▶ ROUTER at HOST:PORT ──▶ next_message: [identity, word]        send(identity, word) ──▶ asker

Memory model: bounded by the sockets' queues and the doorway's limits; messages larger than any word of an asker's are
dropped unread by ZMQ, and so is who does not speak its protocol in time.
Threading: the server's event loop; nothing here waits.
"""

from __future__ import annotations

import zmq

from core.errors import ConfigError
from kvcache.peer_words import MAX_ASKED_BYTES
from transport.address import bind_address
from transport.doorway import Doorway
from transport.intake import IntakeLimits

MAX_QUEUED_MESSAGES = 256
MAX_PARTS = 3
LIMITS = IntakeLimits(connection_bytes=4 << 20, total_bytes=64 << 20)


class Door:
    """Bound to host:port (port 0: any free one) until `close`. Raises ConfigError if it cannot be."""

    def __init__(self, host: str, port: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            wanted = bind_address(host).removesuffix("*") + port
            router = self._context.socket(zmq.ROUTER)
            for option, value in (
                (zmq.LINGER, 0),
                (zmq.ROUTER_MANDATORY, 1),
                (zmq.MAXMSGSIZE, MAX_ASKED_BYTES),
                (zmq.SNDHWM, MAX_QUEUED_MESSAGES),
                (zmq.RCVHWM, MAX_QUEUED_MESSAGES),
                (zmq.IPV6, int("[" in wanted)),
            ):
                router.setsockopt(option, value)
            self._doorway = Doorway(self._context, router, wanted, LIMITS, None)
        except (ConfigError, zmq.ZMQError) as error:
            self._context.destroy(0)
            raise ConfigError(f"--cache: cannot listen at {host}:{port} for peers: {error}") from error
        self._router = router
        self.address = self._doorway.address
        self.fd = int(self._router.getsockopt(zmq.FD))

    def next_message(self) -> list[bytes] | None:
        """At most MAX_PARTS parts of the next message; None if there is none. More parts are dropped as they come."""
        if self._router.closed:
            return None
        parts: list[bytes] = []
        num_bytes, num_parts = 0, 0
        try:
            part = self._router.recv(zmq.NOBLOCK, copy=False)
            parts.append(part.bytes)
            while part.more:
                part = self._router.recv(zmq.NOBLOCK, copy=False)
                num_bytes, num_parts = num_bytes + len(part), num_parts + 1
                if len(parts) < MAX_PARTS:
                    parts.append(part.bytes)
        except zmq.Again:
            return None
        if not num_parts:  # only the first part, the connection's name, which did not come over the line
            return parts
        return parts if self._doorway.took(part, num_bytes, num_parts) else parts[:1]

    def watch(self) -> None:
        """Every now and then: who came, who left, who sends too much."""
        self._doorway.turn(True)

    def send(self, identity: bytes, message: bytes) -> bool:
        """False if the asker is gone or has too much unread."""
        try:
            self._router.send_multipart([identity, message], zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def close(self) -> None:
        self._doorway.close()
        self._context.destroy(0)
