"""The socket of one zmq link: connected, encrypted where there are keys, watched for its end, bounded in what it takes.

Memory and threading: the transport's I/O thread alone.
"""

from __future__ import annotations

import zmq

from transport.curve import secure_caller, why_refused
from transport.doorway import CHECK_MS, HANDSHAKE_TIMEOUT_MS, keep_alive
from transport.intake import Intake, IntakeLimits
from transport.keys import Keys
from transport.monitor import ENDED, REFUSED, Monitor
from transport.zmq_wire import MAX_FRAMES_IN_FLIGHT, MAX_PART_BYTES, WINDOW_BYTES

LIMITS = IntakeLimits(connection_bytes=4 * WINDOW_BYTES, total_bytes=4 * WINDOW_BYTES, max_connections=1)


class ZmqLine:
    """Begins to connect. Raises zmq.ZMQError where the system refuses a socket."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, keys: Keys | None) -> None:
        self._keys = keys
        self._intake = Intake(int(address.rpartition(":")[2]), LIMITS)
        self._looked_s = 0.0
        self.socket = context.socket(zmq.DEALER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.RECONNECT_IVL, -1),
            (zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS),
            (zmq.MAXMSGSIZE, MAX_PART_BYTES),
            (zmq.SNDHWM, 4 * MAX_FRAMES_IN_FLIGHT),
            (zmq.RCVHWM, 4 * MAX_FRAMES_IN_FLIGHT),
            (zmq.IPV6, int("[" in address)),
        ):
            self.socket.setsockopt(option, value)
        keep_alive(self.socket)
        secure_caller(self.socket, keys)
        self.monitor = Monitor(context, self.socket, zmq.EVENT_CONNECTED | REFUSED | ENDED)
        try:
            self.socket.connect(address)
        except zmq.ZMQError:
            self.close()
            raise

    def receive(self) -> list[zmq.Frame]:
        """At most three parts of the next message; none if it is to be dropped. Raises zmq.Again without one."""
        part = self.socket.recv(zmq.NOBLOCK, copy=False)
        parts, num_bytes, num_parts = [part], len(part), 1
        while part.more:
            part = self.socket.recv(zmq.NOBLOCK, copy=False)
            num_bytes, num_parts = num_bytes + len(part), num_parts + 1
            if num_parts <= 3:
                parts.append(part)
        return parts if self._intake.took(part, num_bytes, num_parts) else []

    def why_ended(self, now_s: float, is_monitored: bool) -> str | None:
        """Why the connection is over, empty where nobody says why; None while it is not."""
        is_over, why = False, ""
        for event in self.monitor.take() if is_monitored else ():
            if event.kind == zmq.EVENT_CONNECTED:
                self._intake.opened(event.value)
            elif event.kind & REFUSED:
                is_over, why = True, why_refused(event.kind, event.value, self._keys)
            else:
                is_over = True
        if now_s - self._looked_s >= CHECK_MS / 1000:
            self._looked_s = now_s
            if self._intake.check():
                is_over, why = True, "it sent too much at once"
        return why if is_over else None

    def close(self) -> None:
        """Nothing can be polled any more."""
        self.monitor.close()
        self.socket.close(0)
