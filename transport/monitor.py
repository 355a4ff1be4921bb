"""What libzmq tells of a socket's connections: opened, refused, ended.

Memory model: events wait without a limit, in a queue that its owner empties at every turn. Nothing else would do:
libzmq's own thread, which serves every socket, waits for room in a full one, and for ever once its reader is closed.
So `close` first stops the events.
Threading: whoever owns the socket.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import zmq
from zmq.utils.monitor import parse_monitor_message

OPENED = zmq.EVENT_ACCEPTED | zmq.EVENT_CONNECTED
REFUSED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
ENDED = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
EVENTS_PER_TURN = 1024
_numbers = itertools.count()


class Event(NamedTuple):
    """kind: one of zmq's; value: a descriptor where a connection is opened or ended, a code where it is refused."""

    kind: int
    value: int


class Monitor:
    """Watches `socket` from construction until `close`."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes], kinds: int) -> None:
        self._watched = socket
        address = f"inproc://baton-monitor-{next(_numbers)}"
        socket.monitor(address, kinds)
        self.socket: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self.socket.connect(address)

    def take(self) -> list[Event]:
        """What has happened since the last call."""
        events: list[Event] = []
        while len(events) < EVENTS_PER_TURN:
            try:
                message = parse_monitor_message(self.socket.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                break
            events.append(Event(int(message["event"]), int(message["value"])))
        return events

    def close(self) -> None:
        """Before the watched socket's own close."""
        self._watched.disable_monitor()
        self.socket.close(0)
