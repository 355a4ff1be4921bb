"""The owner's side of memory shared on one host (shm, cuda_ipc): greets connectors, hears who writes under which tag.

    abstract socket, a side socket per connection ──▶ Writer (one per connection) ──▶ ShmLanding (one per tag)

Memory model: landings are held by whoever opened them and only weakly here, so that a closed landing still learns
that its writer has hung up. Words for tags without a landing wait, bounded, until `expect` asks for them.
Threading: one thread runs `ShmListener._run`; `Letterbox`'s lock guards what it shares with the engine's thread, which
reads the side sockets too, when it must know who writes. The listener's thread also watches the connections that this
process has made to other owners, so that a dead owner's memory is let go at once.
"""

from __future__ import annotations

import collections
import contextlib
import os
import secrets
import select
import socket
import struct
import threading
import weakref
from collections.abc import Callable
from typing import NamedTuple

from core.errors import TransferError
from transport.landing import MAX_NOTICES
from transport.shm_wire import MAX_PACKET_BYTES, Opening, Packet, decode_packet

MAX_CONNECTIONS = 1024
MAX_EARLY_TAGS = 1024
MAX_EARLY_PACKETS = 16
PACKETS_PER_TURN = 64
OPENINGS_PER_TURN = 4096
"""More than a side socket holds (some 280, by the kernel's default)."""

_PEER_CREDENTIALS = struct.Struct("3i")


class Greeting(NamedTuple):
    """What a connector gets first: a word, and descriptors if the memory has any."""

    word: bytes
    fds: list[int]


class Writer:
    """One connection. side: where it announces itself. `has_hung_up`: its mapping is gone."""

    def __init__(self, connection: socket.socket, side: socket.socket) -> None:
        self.connection = connection
        self.side = side
        self.has_hung_up = False

    def close(self) -> None:
        self.connection.close()
        self.side.close()


class ShmLanding:
    """A `transport.base.Landing` that sees notices but not bytes."""

    def __init__(self, box: Letterbox) -> None:
        self._box = box
        self._notices: collections.deque[bytes] = collections.deque()
        self._writers: set[Writer] = set()
        self.is_open = True

    def poll(self) -> list[bytes]:
        with self._box.lock:
            notices = list(self._notices)
            self._notices.clear()
        return notices

    def num_written(self) -> int | None:
        return None

    def digest(self) -> int | None:
        return None

    def peer_gone(self) -> bool:
        with self._box.lock:
            if not self._are_all_gone():
                return False
            self._box.hear_openings()
            return self._are_all_gone()

    def has_writer(self) -> bool:
        with self._box.lock:
            if not self._writers:
                self._box.hear_openings()
            return bool(self._writers)

    def close(self) -> bool:
        """False: a mapped memory can be written until its writer says that it stopped, or is gone."""
        self.is_open = False
        return False

    def take(self, writer: Writer, packet: Packet) -> bool:
        """False if too many notices wait. Under the letterbox's lock."""
        self._writers.add(writer)
        if isinstance(packet, Opening) or not self.is_open:
            return True
        if len(self._notices) >= MAX_NOTICES:
            return False
        self._notices.append(packet.notice)
        return True

    def _are_all_gone(self) -> bool:
        return bool(self._writers) and all(writer.has_hung_up for writer in self._writers)


class Letterbox:
    """Landings by tag, and the words that came before their landing. malformed: packets of side sockets that were
    dropped."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.writers: set[Writer] = set()
        self.malformed = 0
        self._landings: weakref.WeakValueDictionary[str, ShmLanding] = weakref.WeakValueDictionary()
        self._early: collections.OrderedDict[str, list[tuple[Writer, Packet]]] = collections.OrderedDict()

    def open(self, tag: str) -> ShmLanding:
        """Raises TransferError if the tag is open already."""
        with self.lock:
            self.hear_openings()  # those of an earlier landing of this name are not for the new one alone
            known = self._landings.get(tag)
            if known is not None and known.is_open:
                raise TransferError(f"a landing is open already under tag {tag!r}")
            landing = ShmLanding(self)
            self._landings[tag] = landing
            for writer, packet in self._early.pop(tag, []):
                landing.take(writer, packet)
        return landing

    def deliver(self, writer: Writer, packet: Packet) -> bool:
        """False if the packet had to be dropped. What lies at the side socket is heard behind it: a notice is waited
        for."""
        with self.lock:
            is_delivered = self._deliver(writer, packet)
        with self.lock:
            self._hear_openings_of(writer)
        return is_delivered

    def hear_openings(self) -> None:
        """What lies at the side sockets. Under the lock."""
        for writer in self.writers:
            self._hear_openings_of(writer)

    def add(self, writer: Writer) -> None:
        with self.lock:
            self.writers.add(writer)

    def remove(self, writer: Writer) -> None:
        """Its connection has ended."""
        with self.lock:
            self._hear_openings_of(writer)
            self.writers.discard(writer)
            writer.has_hung_up = True

    def _hear_openings_of(self, writer: Writer) -> None:
        for _ in range(OPENINGS_PER_TURN):
            try:
                wire = writer.side.recv(MAX_PACKET_BYTES + 1)
            except OSError:  # nothing there; or the peer is gone, of which its connection tells
                return
            if not wire:
                return
            packet = decode_packet(wire) if len(wire) <= MAX_PACKET_BYTES else None
            if not isinstance(packet, Opening) or not self._deliver(writer, packet):
                self.malformed += 1

    def _deliver(self, writer: Writer, packet: Packet) -> bool:
        landing = self._landings.get(packet.tag)
        if landing is not None:
            return landing.take(writer, packet)
        waiting = self._early.setdefault(packet.tag, [])
        waiting.append((writer, packet))
        while len(self._early) > MAX_EARLY_TAGS:
            self._early.popitem(last=False)
        if len(waiting) > MAX_EARLY_PACKETS:
            waiting.pop()
            return False
        return True


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


def peer_pid(connection: socket.socket) -> int:
    """The process that holds the other end (that listened, where we connected); 0 in another process namespace."""
    return _credentials(connection)[0]


def peer_uid(connection: socket.socket) -> int:
    """The user who holds the other end."""
    return _credentials(connection)[1]


def _credentials(connection: socket.socket) -> tuple[int, int, int]:
    """Process, user and group."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    pid, uid, gid = _PEER_CREDENTIALS.unpack(credentials)
    return pid, uid, gid
