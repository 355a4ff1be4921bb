"""The control plane's sockets to the peers that it speaks to: one PUSH each, watched for the end of its connection.

Memory model: at most MAX_PEERS sockets, the one used least lately is closed; MAX_QUEUED_MESSAGES in each. Nothing is
received: what a listener sends all the same is bounded by the intake's limits.
Threading: every method takes the lock.
"""

from __future__ import annotations

import collections
import threading
from typing import NamedTuple

import zmq

from transport.curve import secure_caller, why_refused
from transport.doorway import HANDSHAKE_TIMEOUT_MS, keep_alive
from transport.intake import Intake, IntakeLimits
from transport.keys import Keys
from transport.monitor import ENDED, REFUSED, Monitor

MAX_PEERS = 1024
MAX_QUEUED_MESSAGES = 10_000
LIMITS = IntakeLimits(connection_bytes=256 << 10, total_bytes=256 << 10, max_connections=1)
_LOST = ENDED | zmq.EVENT_CONNECT_RETRIED


class _Line(NamedTuple):
    """One peer's socket."""

    push: zmq.Socket[bytes]
    monitor: Monitor
    intake: Intake


class Outbox:
    """Sockets by address. keys: of the cluster; None: nothing is encrypted."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: Keys | None) -> None:
        self._context = context
        self._keys = keys
        self._lock = threading.Lock()
        self._lines: collections.OrderedDict[str, _Line] = collections.OrderedDict()
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._lines)

    def __contains__(self, address: str) -> bool:
        return address in self._lines

    def send(self, address: str, wire: bytes) -> bool:
        """Queues a message; False if its queue is full, the system refuses a socket, or this is closed."""
        with self._lock:
            if self._is_closed:
                return False
            try:
                if address not in self._lines:
                    self._open(address)
                self._lines.move_to_end(address)
                self._lines[address].push.send(wire, zmq.NOBLOCK)
            except zmq.ZMQError:  # EAGAIN: the queue is full; otherwise the system refuses a socket
                return False
        return True

    def take_lost(self) -> list[tuple[str, str]]:
        """Addresses whose connection broke since the last call, and why it was refused, if it was; their sockets are
        closed."""
        lost = []
        with self._lock:
            for address, line in list(self._lines.items()):
                is_lost, why = self._watch(line)
                if is_lost:
                    lost.append((address, why))
                    self._close(address)
        return lost

    def forget(self, address: str) -> None:
        """Closes the socket to an address."""
        with self._lock:
            if address in self._lines:
                self._close(address)

    def close(self) -> bool:
        """False if it was closed already."""
        with self._lock:
            was_closed, self._is_closed = self._is_closed, True
            for address in list(self._lines):
                self._close(address)
        return not was_closed

    def _watch(self, line: _Line) -> tuple[bool, str]:
        is_lost, why = False, ""
        for event in line.monitor.take():
            if event.kind == zmq.EVENT_CONNECTED:
                line.intake.opened(event.value)
            elif event.kind & REFUSED:
                why = why_refused(event.kind, event.value, self._keys)
            is_lost = is_lost or bool(event.kind & _LOST)
        line.intake.check()
        return is_lost, why

    def _open(self, address: str) -> None:
        while len(self._lines) >= MAX_PEERS:
            self._close(next(iter(self._lines)))
        push = self._context.socket(zmq.PUSH)
        monitor = None
        try:
            for option, value in (
                (zmq.LINGER, 0),
                (zmq.SNDHWM, MAX_QUEUED_MESSAGES),
                (zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS),
                (zmq.IPV6, int("[" in address)),
            ):
                push.setsockopt(option, value)
            keep_alive(push)
            secure_caller(push, self._keys)
            monitor = Monitor(self._context, push, _LOST | REFUSED | zmq.EVENT_CONNECTED)
            push.connect(address)
        except zmq.ZMQError:
            if monitor is not None:
                monitor.close()
            push.close(0)
            raise
        self._lines[address] = _Line(push, monitor, Intake(int(address.rpartition(":")[2]), LIMITS))

    def _close(self, address: str) -> None:
        line = self._lines.pop(address)
        line.monitor.close()
        line.push.close(0)
