"""The owner's side of the NIXL transport: listens, hands out its agent, grants tags, and tells the end of a writer.

    socket ──▶ Guest (one per connection): Hello within ten seconds, then one Writer ──▶ landings

A writer is gone when its own end of the connection is: the kernel closes a dead process's sockets when its last thread
has ended, and a living one hangs up after it has abandoned what it was copying. It may have left bytes on the way that
*our* progress would still put in place, where UCX moves them by messages (TCP, shared memory). So after the end of a
connection this side drives progress for a while, and only then calls the writer ended. Where the other host has gone
silent instead, it may live on and notices itself after SILENT_AFTER_MS, as we did: the wait is longer.
Memory model: connections, tags per writer, parked openings and frames are bounded.
Threading: the transport's thread, except for the constructor.
"""

from __future__ import annotations

import collections
import hmac
import select
import socket
from collections.abc import Callable

from core.errors import ConfigError, TransferError
from transport.nixl_landing import Landings, Writer
from transport.nixl_socket import NixlSocket
from transport.nixl_thread import NixlThread
from transport.nixl_wire import (
    Busy,
    Heard,
    Hello,
    Opened,
    Opening,
    Refused,
    Shut,
    Stopped,
    ToWriter,
    Welcome,
    decode_notice,
    decode_to_owner,
    encode,
)
from transport.regions import MAX_TAG_CHARACTERS

MAX_CONNECTIONS = 1024
MAX_TAGS_PER_WRITER = 4096
MAX_PARKED = 1024
MAX_FRAME_BYTES = 4 * MAX_TAG_CHARACTERS + 256
PARKING_TIMEOUT_S = 2.0
HELLO_TIMEOUT_S = 10.0
DRAIN_S = 0.25
DRAIN_TURNS = 50
SILENT_DRAIN_S = 15.0
ACCEPT_PAUSE_S = 0.1


class Guest:
    """One connection to the owner. link: its name, empty until it has said Hello. is_deaf: we hung up, it has not."""

    def __init__(self, connection: NixlSocket, now_s: float) -> None:
        self.socket = connection
        self.writer = Writer()
        self.link = ""
        self.is_deaf = False
        self.is_busy = False
        self.until_s = now_s + HELLO_TIMEOUT_S
        self.turns_left = 0

    def is_draining(self) -> bool:
        return self.turns_left > 0


class NixlListener:
    """Raises ConfigError if the host is not ours. `metadata`: by digest, what was described."""

    def __init__(self, host: str, token: str, thread: NixlThread, metadata: Callable[[bytes], bytes | None]) -> None:
        self._token = token
        self._thread = thread
        self._metadata = metadata
        self._guests: list[Guest] = []
        self._parked: collections.deque[tuple[str, Guest, float]] = collections.deque()
        self.malformed = 0
        self._socket = _Door(host, thread)
        self.landings = Landings(
            lambda tag: thread.call(lambda: self._unpark(tag)), lambda tag: thread.call(lambda: self._shut(tag))
        )

    @property
    def address(self) -> str:
        """Where peers connect."""
        return self._socket.address

    def start(self) -> None:
        """Begins to accept. On the thread, or before it runs."""
        self._thread.deliver = self.deliver
        self._thread.add(self)
        self._socket.open(self._accept)

    def turn(self, now_s: float) -> bool:
        self._socket.turn(now_s)
        while self._parked and self._parked[0][2] <= now_s:
            tag, guest, _ = self._parked.popleft()
            self._send(guest, Refused(tag, "nobody expects anything under this tag"))
        for guest in list(self._guests):
            if guest.is_draining():
                guest.turns_left = max(guest.turns_left - 1, 1)
                if guest.turns_left == 1 and guest.until_s <= now_s:
                    self._bury(guest)
            elif not guest.link and guest.until_s <= now_s:
                self._hang_up(guest)
        return False

    def is_busy(self) -> bool:
        return any(guest.is_busy or guest.is_draining() for guest in self._guests)

    def end(self, why: str) -> None:
        """Hangs up on everyone."""
        self._socket.close()
        for guest in list(self._guests):
            if not guest.is_draining():
                self._thread.forget(guest.socket.fileno())
                guest.socket.close()
        self._guests.clear()
        self._parked.clear()
        self._thread.remove(self)

    def deliver(self, wire: bytes) -> None:
        """A NIXL notification."""
        notice = decode_notice(wire)
        guest = None if notice is None else next((each for each in self._guests if each.link == notice.link), None)
        if guest is None or notice is None:
            self.malformed += 1
            return
        with self.landings.lock:
            landing = guest.writer.granted.get(notice.tag)
            if landing is None or not landing.take(notice.notice):
                self.malformed += 1
        self._send(guest, Heard(notice.number))

    def _accept(self, connection: socket.socket) -> None:
        if len(self._guests) >= MAX_CONNECTIONS:
            connection.close()
            return
        try:
            guest = Guest(NixlSocket(connection, MAX_FRAME_BYTES), self._thread.clock.monotonic_s())
        except OSError:  # it has ended already
            connection.close()
            return
        self._guests.append(guest)
        self._watch(guest)

    def _watch(self, guest: Guest) -> None:
        events = select.EPOLLIN | (select.EPOLLOUT if guest.socket.wants_to_write() else 0)
        self._thread.watch(guest.socket.fileno(), events, lambda mask: self._hear(guest, mask))

    def _hear(self, guest: Guest, mask: int) -> None:
        if guest.is_deaf:
            if guest.socket.has_ended():
                self._lose(guest)
            return
        try:
            if mask & select.EPOLLOUT:
                guest.socket.flush()
            for body in guest.socket.receive():
                self._obey(guest, body)
        except TransferError:
            self._hang_up(guest)
            return
        if not guest.is_deaf:
            self._watch(guest)

    def _obey(self, guest: Guest, body: bytes) -> None:
        frame = decode_to_owner(body)
        if frame is None or isinstance(frame, Hello) == bool(guest.link):
            self.malformed += 1
            raise TransferError("the peer does not keep to the protocol")
        if isinstance(frame, Hello):
            self._greet(guest, frame)
        elif isinstance(frame, Opening):
            self._answer(guest, frame.tag)
        elif isinstance(frame, Busy):
            guest.is_busy = frame.is_busy
        elif isinstance(frame, Stopped):
            with self.landings.lock:
                landing = guest.writer.granted.pop(frame.tag, None)
                if landing is not None:
                    landing.has_stopped(guest.writer)

    def _greet(self, guest: Guest, hello: Hello) -> None:
        metadata = self._metadata(hello.metadata_digest)
        is_known = hmac.compare_digest(hello.token.encode(), self._token.encode())
        is_twice = any(other.link == hello.link for other in self._guests)
        if not is_known or metadata is None or not hello.link or is_twice:
            raise TransferError("a stranger")
        guest.link = hello.link
        guest.is_busy = True  # until it says otherwise: making the back end's own connection takes progress
        self._send(guest, Welcome(metadata))

    def _answer(self, guest: Guest, tag: str) -> None:
        """Grants, refuses or parks an opening."""
        with self.landings.lock:
            landing = self.landings.find(tag)
            if landing is None and not self.landings.was_closed(tag) and len(self._parked) < MAX_PARKED:
                self._parked.append((tag, guest, self._thread.clock.monotonic_s() + PARKING_TIMEOUT_S))
                return
            if landing is not None and len(guest.writer.granted) < MAX_TAGS_PER_WRITER:
                landing.let_in(guest.writer)
                reply: ToWriter = Opened(tag)
            else:
                reply = Refused(tag, "too many tags" if landing is not None else "the receiver closed the landing")
        self._send(guest, reply)

    def _unpark(self, tag: str) -> None:
        parked, self._parked = self._parked, collections.deque()
        for entry in parked:
            if entry[0] == tag:
                self._answer(entry[1], tag)
            else:
                self._parked.append(entry)

    def _shut(self, tag: str) -> None:
        for guest in list(self._guests):
            with self.landings.lock:
                landing = guest.writer.granted.get(tag)
                is_shut = landing is not None and not landing.is_open()
            if is_shut:
                self._send(guest, Shut(tag))

    def _send(self, guest: Guest, frame: ToWriter) -> None:
        if guest not in self._guests or guest.is_deaf:
            return
        try:
            guest.socket.send(encode(frame))
        except TransferError:
            self._hang_up(guest)
            return
        self._watch(guest)

    def _hang_up(self, guest: Guest) -> None:
        """Stops talking. Who could write is waited for: only its own end of the connection tells that it cannot."""
        if guest not in self._guests or guest.is_deaf:
            return
        guest.is_deaf = True
        self._parked = collections.deque(entry for entry in self._parked if entry[1] is not guest)
        if not guest.link or guest.socket.has_ended():
            self._lose(guest)
            return
        guest.socket.say_goodbye()
        self._thread.watch(guest.socket.fileno(), select.EPOLLIN, lambda mask: self._hear(guest, mask))

    def _lose(self, guest: Guest) -> None:
        """The connection has ended."""
        self._thread.forget(guest.socket.fileno())
        guest.socket.close()
        if not guest.link:
            self._guests.remove(guest)
            return
        guest.turns_left = DRAIN_TURNS
        wait_s = SILENT_DRAIN_S if guest.socket.is_silent else DRAIN_S
        guest.until_s = self._thread.clock.monotonic_s() + wait_s

    def _bury(self, guest: Guest) -> None:
        self._guests.remove(guest)
        with self.landings.lock:
            guest.writer.has_ended = True
            guest.writer.granted.clear()


class _Door:
    """The listening socket. Where descriptors run out it stops listening for a moment instead of spinning."""

    def __init__(self, host: str, thread: NixlThread) -> None:
        self._thread = thread
        self._shut_until_s: float | None = None
        self._accept: Callable[[socket.socket], None] = socket.socket.close
        try:
            family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
            self._socket = socket.create_server((host, 0), family=family, backlog=256)
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"cannot listen on {host!r}: {error}") from error
        self._socket.setblocking(False)
        name = self._socket.getsockname()
        self.address = f"tcp://[{name[0]}]:{name[1]}" if family == socket.AF_INET6 else f"tcp://{name[0]}:{name[1]}"

    def open(self, accept: Callable[[socket.socket], None]) -> None:
        """On the thread."""
        self._accept = accept
        self._thread.watch(self._socket.fileno(), select.EPOLLIN, lambda mask: self._take())

    def turn(self, now_s: float) -> None:
        if self._shut_until_s is not None and now_s >= self._shut_until_s:
            self._shut_until_s = None
            self.open(self._accept)

    def close(self) -> None:
        self._thread.forget(self._socket.fileno())
        self._socket.close()

    def _take(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, ConnectionError):  # the connector gave up in between
            return
        except OSError:
            self._thread.forget(self._socket.fileno())
            self._shut_until_s = self._thread.clock.monotonic_s() + ACCEPT_PAUSE_S
            return
        self._accept(connection)
