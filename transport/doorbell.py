"""How other threads wake an I/O thread that waits for descriptors.

Memory model: one eventfd. Threading: `ring` and `close` from any thread, also after `free`.
"""

from __future__ import annotations

import os
import threading


class Doorbell:
    """An eventfd that other threads ring; safe to ring after it was freed."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.is_closed = False
        self._lock = threading.Lock()
        self._is_free = False

    def ring(self) -> None:
        with self._lock:
            if not self._is_free:
                os.eventfd_write(self.fd, 1)

    def answer(self) -> None:
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return

    def close(self) -> None:
        self.is_closed = True
        self.ring()

    def free(self) -> None:
        with self._lock:
            self._is_free = True
            os.close(self.fd)
