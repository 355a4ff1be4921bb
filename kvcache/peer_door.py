"""The ZMQ socket that askers connect to.

    askers (DEALER) ══▶ ROUTER at HOST:PORT ──▶ next_message: [identity, word]        send(identity, word) ──▶ asker

Memory model: bounded by the sockets' queues; messages larger than any word of an asker's are dropped unread by ZMQ, and
so is who does not speak its protocol within HANDSHAKE_TIMEOUT_MS.
Threading: the server's event loop; nothing here waits.
"""

from __future__ import annotations

import zmq

from core.errors import ConfigError
from kvcache.peer_words import MAX_ASKED_BYTES
from transport.address import bind_address

MAX_QUEUED_MESSAGES = 256
MAX_PARTS = 3
HANDSHAKE_TIMEOUT_MS = 2000


class Door:
    """Bound to host:port (port 0: any free one) until `close`. Raises ConfigError if it cannot be."""

    def __init__(self, host: str, port: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            wanted = bind_address(host).removesuffix("*") + port
            self._router = self._context.socket(zmq.ROUTER)
            for option, value in (
                (zmq.LINGER, 0),
                (zmq.ROUTER_MANDATORY, 1),
                (zmq.MAXMSGSIZE, MAX_ASKED_BYTES),
                (zmq.SNDHWM, MAX_QUEUED_MESSAGES),
                (zmq.RCVHWM, MAX_QUEUED_MESSAGES),
                (zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS),
                (zmq.IPV6, int("[" in wanted)),
            ):
                self._router.setsockopt(option, value)
            self._router.bind(wanted)
        except (ConfigError, zmq.ZMQError) as error:
            self._context.destroy(0)
            raise ConfigError(f"--cache: cannot listen at {host}:{port} for peers: {error}") from error
        self.address = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self.fd = int(self._router.getsockopt(zmq.FD))

    def next_message(self) -> list[bytes] | None:
        """At most MAX_PARTS parts of the next message; None if there is none. More parts are dropped as they come."""
        if self._router.closed:
            return None
        parts: list[bytes] = []
        try:
            part = self._router.recv(zmq.NOBLOCK, copy=False)
            parts.append(part.bytes)
            while part.more:
                part = self._router.recv(zmq.NOBLOCK, copy=False)
                if len(parts) < MAX_PARTS:
                    parts.append(part.bytes)
        except zmq.Again:
            return None
        return parts

    def send(self, identity: bytes, message: bytes) -> bool:
        """False if the asker is gone or has too much unread."""
        try:
            self._router.send_multipart([identity, message], zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def close(self) -> None:
        self._router.close(0)
        self._context.destroy(0)
