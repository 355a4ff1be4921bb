"""The owner's side of memory shared on one host (shm, cuda_ipc): greets connectors, and hears what they say.

    abstract socket, a side socket per connection ──▶ Writer (one per connection) ──▶ Letterbox (shm_letterbox.py)

Threading: one thread runs `ShmListener._run`; it also watches the connections that this process has made to other
owners, so that a dead owner's memory is let go at once.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
import threading
from collections.abc import Callable
from typing import NamedTuple

from transport.credentials import peer_uid
from transport.shm_letterbox import Letterbox, Writer
from transport.shm_wire import MAX_PACKET_BYTES, decode_packet

MAX_CONNECTIONS = 1024
PACKETS_PER_TURN = 64


class Greeting(NamedTuple):
    """What a connector gets first: a word, and descriptors if the memory has any."""

    word: bytes
    fds: list[int]


class ShmListener:
    """Listens on an abstract socket from construction until `close`. `greet` is asked at each connection."""

    def __init__(self, box: Letterbox, greet: Callable[[], Greeting]) -> None:
        self._box = box
        self._greet = greet
        self._writers: dict[int, Writer] = {}
        self._watched: dict[int, Callable[[], object]] = {}
        self._malformed = 0
        self.name = f"baton-{secrets.token_hex(16)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(b"\0" + self.name.encode())
        self._socket.listen(64)
        self._socket.setblocking(False)
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._epoll.register(self._socket.fileno(), select.EPOLLIN)
        self._epoll.register(self._stop_fd, select.EPOLLIN)
        self._pause = select.poll()
        self._pause.register(self._stop_fd, select.POLLIN)
        self._thread = threading.Thread(target=self._run, name="baton-shm", daemon=True)
        self._thread.start()

    @property
    def malformed(self) -> int:
        """Packets that were dropped."""
        return self._malformed + self._box.malformed

    def watch(self, fd: int, on_hang_up: Callable[[], object]) -> None:
        """Calls once, on the thread, when the other end of a connection of ours has hung up, unless `unwatch` comes
        before the connection is closed here."""
        self._watched[fd] = on_hang_up
        with contextlib.suppress(OSError, ValueError):  # the listener is closed
            self._epoll.register(fd, select.EPOLLRDHUP | select.EPOLLONESHOT)

    def unwatch(self, fd: int) -> None:
        """See `watch`."""
        self._watched.pop(fd, None)
        with contextlib.suppress(OSError, ValueError):
            self._epoll.unregister(fd)

    def close(self) -> None:
        """Hangs up on everyone. Mappings that peers hold stay with them."""
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join()
        with self._box.lock:
            self._box.writers.clear()
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
        self._epoll.close()
        self._socket.close()
        os.close(self._stop_fd)

    def _run(self) -> None:
        while True:
            for fd, events in self._epoll.poll():
                if fd == self._stop_fd:
                    return
                if fd == self._socket.fileno():
                    self._accept()
                elif fd in self._writers:
                    self._hear(self._writers[fd], bool(events & select.EPOLLHUP))
                elif (on_hang_up := self._watched.pop(fd, None)) is not None:
                    on_hang_up()

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, ConnectionError):  # the connector gave up in between
            return
        except OSError:  # descriptors ran out, and the event stays: do not spin
            self._pause.poll(100)
            return
        connection.setblocking(False)
        if len(self._writers) >= MAX_CONNECTIONS or peer_uid(connection) != os.getuid():
            connection.close()
            return
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:
            connection.close()
            return
        ours.setblocking(False)
        writer = Writer(connection, ours)
        try:
            greeting = self._greet()
            socket.send_fds(connection, [greeting.word], [*greeting.fds, theirs.fileno()])
        except OSError:
            writer.close()
            return
        finally:
            theirs.close()
        self._writers[connection.fileno()] = writer
        self._box.add(writer)
        self._epoll.register(connection.fileno(), select.EPOLLIN)

    def _hear(self, writer: Writer, is_hung_up: bool) -> None:
        """Takes some packets; after the last packet of a connection that has ended, its writer is gone."""
        for _ in range(PACKETS_PER_TURN):
            try:
                wire = writer.connection.recv(MAX_PACKET_BYTES + 1)
            except BlockingIOError:
                return
            except OSError:  # reset: the peer died with words of ours unread
                wire = b""
            if not wire:
                self._end_of(writer, is_hung_up)
                return
            packet = decode_packet(wire) if len(wire) <= MAX_PACKET_BYTES else None
            if packet is None or not self._box.deliver(writer, packet):
                self._malformed += 1

    def _end_of(self, writer: Writer, is_hung_up: bool) -> None:
        fd = writer.connection.fileno()
        if not is_hung_up:  # it only stopped talking, and may still write: wait for its end, deaf
            self._epoll.modify(fd, 0)
            return
        self._epoll.unregister(fd)
        del self._writers[fd]
        self._box.remove(writer)
        writer.close()
