"""How other threads wake an I/O thread that waits for descriptors.

Memory model: one eventfd. Threading: `ring` and `close` from any thread, also after `free`.
"""

from __future__ import annotations

import contextlib
import os
import threading


class Doorbell:
    """An eventfd that other threads ring; safe to ring after it was freed."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.is_closed = False
        self._lock = threading.Lock()
        self._is_free = False
        self._is_rung = False

    def ring(self) -> None:
        """Wakes the thread, unless it was rung and has not answered yet: what is queued now it will see then."""
        with self._lock:
            if not (self._is_free or self._is_rung):
                self._is_rung = True
                os.eventfd_write(self.fd, 1)

    def answer(self) -> None:
        """Before looking at any queue."""
        with self._lock, contextlib.suppress(BlockingIOError):
            self._is_rung = False
            os.eventfd_read(self.fd)

    def close(self) -> None:
        self.is_closed = True
        self.ring()

    def free(self) -> None:
        with self._lock:
            self._is_free = True
            os.close(self.fd)
