"""A bell between two processes of one host: a thread of one has something to say that the other would sleep through.

    ringing process: ring ──▶ an empty datagram ──▶ a thread of the process that hangs up the bell: `rung()`

Threads of one process have transport/doorbell.py. This carries nothing but the fact, so one ring too many costs an
extra look, and one too few lasts until the sleep's own end.

Memory model: nothing is kept. The socket's name is abstract and random; rings of other users are dropped.
Threading: `rung` is called on the bell's own thread; `Ringer.ring` is for any thread and never waits.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress

_CREDENTIALS = struct.Struct("3i")
_LOOK_S = 0.1
_MAX_LOOKS = 50


class Bell:
    """Hangs until `close`. Raises OSError where there is no such socket (Linux only)."""

    def __init__(self, rung: Callable[[], None]) -> None:
        self.name = f"baton-bell-{secrets.token_hex(16)}"
        self._rung = rung
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(f"\0{self.name}")
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="baton-bell", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, or leaves it after 5 s if `rung` hangs. May be called again."""
        if not self._is_closed:
            self._is_closed = True
            ringer = Ringer()
            for _ in range(_MAX_LOOKS):  # a ring is lost while others fill the socket
                ringer.ring(self.name)
                self._thread.join(_LOOK_S)
                if not self._thread.is_alive():
                    break
            ringer.close()
            self._socket.close()

    def _run(self) -> None:
        while True:
            _, ancillary, _, _ = self._socket.recvmsg(1, socket.CMSG_SPACE(_CREDENTIALS.size))
            if not _is_ours(ancillary):
                continue
            if self._is_closed:
                return
            self._rung()


class Ringer:
    """Whoever rings bells."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def ring(self, name: str) -> None:
        """Does nothing where nobody hears it, or where it is being rung all the time."""
        with suppress(OSError):
            self._socket.sendto(b".", f"\0{name}")

    def close(self) -> None:
        self._socket.close()


def _is_ours(ancillary: list[tuple[int, int, bytes]]) -> bool:
    """Whether a process of our user, or the system's own, has rung."""
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS) and len(data) == _CREDENTIALS.size:
            _, uid, _ = _CREDENTIALS.unpack(data)
            return uid in (os.getuid(), 0)
    return False
