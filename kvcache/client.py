"""An engine's line to the cache server: words out without waiting, answers in on a thread of their own.

    engine's thread ── send ──▶ outbox ───────────────▶ socket ──▶ server     what the socket takes at once
                                  └─────▶ thread ─────▶ socket ──▶ server     the rest
                    ◀─ take ── answers ◀── thread ◀──── socket ◀──            `wake` after each answer

A server that is gone, hangs or talks nonsense costs hits: whatever was asked is never answered, `send` says False, and
the thread tries again. `epoch` counts connections: what was granted under an earlier one is void.

Threading: every method of `CacheClient` may be called from any thread and never waits, but `close` and a `take` that is
told to; `fetch_arena` waits for the server.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from core.errors import Overloaded, ProtocolError, TransferError
from kvcache import wire
from kvcache.outbox import Outbox
from transport.credentials import peer_uid

RETRY_S = 0.25
CONNECT_TIMEOUT_S = 2.0
MAX_ANSWERS = 10_000
DROP_TIMEOUT_S = 60.0
_POLL_S = 0.02
_RECV_BYTES = 1 << 18

A = TypeVar("A")
Answer = wire.Found | wire.Granted


class CacheClient:
    """A connection to the server at `path`, kept up until `close`."""

    def __init__(self, path: str, hello: wire.Hello, wake: Callable[[], None] = lambda: None) -> None:
        self._path = path
        self._hello = hello
        self._wake = wake
        self._lock = threading.Lock()
        self._answered = threading.Condition(self._lock)
        self._outbox = Outbox()
        self._answers: OrderedDict[int, Answer] = OrderedDict()
        self._nobodys: OrderedDict[int, Callable[[Answer], bool]] = OrderedDict()
        self._last_id = 0
        self._epoch = 0
        self._welcome: wire.Welcome | None = None
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closing = False
        self.why_refused = ""
        self._thread = threading.Thread(target=self._run, name="baton-cache-client", daemon=True)
        self._thread.start()

    @property
    def epoch(self) -> int:
        """Changes with every new connection; 0 before the first, and while there is none it is that of the last."""
        return self._epoch

    @property
    def is_connected(self) -> bool:
        return self._welcome is not None

    @property
    def arena_id(self) -> str:
        """Of the arena that is served now; empty while nobody serves."""
        welcome = self._welcome
        return welcome.arena_id if welcome else ""

    def send(self, message: wire.ToServer) -> bool:
        """False if it cannot be sent now: nobody serves, or the server does not read."""
        if not self._outbox.put(wire.frame(message)):
            return False
        if self._outbox.is_behind:
            self._ring()
        return True

    def search(
        self, keys: bytes, *, reserve: bool, tenant: bytes = b"", partial: bytes = b"", root: bytes = b""
    ) -> int:
        """Asks which prefix of the keys is there. The id for `take` and Release; 0 if nobody can be asked."""
        number = self._next_id()
        return number if self.send(wire.Search(number, keys, reserve, partial, root, tenant)) else 0

    def search_partial(self, keys: bytes, before: bytes, tenant: bytes) -> int:
        """Asks which is the first of these partial blocks that is there; as `search`."""
        number = self._next_id()
        return number if self.send(wire.SearchPartial(number, keys, before, tenant)) else 0

    def reserve(self, keys: bytes, tenant: bytes = b"") -> int:
        """Asks which of the keys may be written. The id for `take`; 0 if nobody can be asked."""
        number = self._next_id()
        return number if self.send(wire.Reserve(number, keys, tenant)) else 0

    def take(self, number: int, wait_s: float = 0.0) -> Answer | None:
        """The answer to one question, once; None if it has not come, nor comes within `wait_s`."""
        with self._answered:
            if wait_s and number not in self._answers:
                self._answered.wait_for(lambda: number in self._answers, wait_s)
            return self._answers.pop(number, None)

    def leave(self, number: int, give_back: Callable[[Answer], bool]) -> None:
        """Nobody will take the answer to this question: `give_back` is called with it, here or on the client's thread,
        and again with the next unless it says that this was the last. Never, if the connection ends before."""
        while True:
            with self._lock:
                answer = self._answers.pop(number, None)
                if answer is None:
                    if self._welcome is not None:
                        self._nobodys[number] = give_back
                        _shorten(self._nobodys)
                    return
            if give_back(answer):
                return

    def close(self) -> None:
        """Hangs up and ends the thread."""
        self._closing = True
        self._ring()
        self._thread.join(CONNECT_TIMEOUT_S + 1.0)
        os.close(self._bell)

    def _next_id(self) -> int:
        with self._lock:
            self._last_id += 1
            return self._last_id

    def _ring(self) -> None:
        with contextlib.suppress(OSError):
            os.eventfd_write(self._bell, 1)

    def _run(self) -> None:
        bell = select.poll()
        bell.register(self._bell, select.POLLIN)
        while not self._closing:
            try:
                with self._connect() as connection:
                    try:
                        self._converse(connection)
                    finally:
                        self._hang_up()
            except (OSError, EOFError, ProtocolError):
                pass
            if not self._closing:
                bell.poll(int(RETRY_S * 1e3))

    def _connect(self) -> socket.socket:
        connection, fd, welcome = _greet(self._path, self._hello)
        os.close(fd)
        self.why_refused = welcome.why
        if welcome.why:
            connection.close()
            raise ProtocolError(welcome.why)
        connection.setblocking(False)
        with self._lock:
            self._epoch += 1
            self._outbox.open(connection)
            self._welcome = welcome
        self._wake()
        return connection

    def _hang_up(self) -> None:
        self._outbox.close()
        with self._lock:
            self._welcome = None
            self._answers.clear()
            self._nobodys.clear()
        self._wake()

    def _converse(self, connection: socket.socket) -> None:
        """Until the connection ends, which raises."""
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        received = bytearray()
        sending = memoryview(b"")
        while not self._closing:
            if not sending:
                sending = self._outbox.next()
            poll.register(connection, select.POLLIN | (select.POLLOUT if sending else 0))
            poll.poll()
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._bell)
            with contextlib.suppress(BlockingIOError):
                if sending:
                    sending = sending[connection.send(sending) :]
            with contextlib.suppress(BlockingIOError):
                chunk = connection.recv(_RECV_BYTES)
                if not chunk:
                    raise EOFError
                received += chunk
                self._take_frames(received)

    def _take_frames(self, received: bytearray) -> None:
        head, heard = wire.LENGTH.size, False
        while len(received) >= head:
            size = wire.frame_bytes(bytes(received[:head]))
            if len(received) < head + size:
                break
            message = wire.decode_at_client(bytes(received[head : head + size]))
            del received[: head + size]
            heard = True
            if isinstance(message, wire.Found | wire.Granted):
                self._keep(message)
        if heard:
            self._wake()

    def _keep(self, answer: Answer) -> None:
        with self._lock:
            give_back = self._nobodys.pop(answer.id, None)
            if give_back is None:
                self._answers[answer.id] = answer
                _shorten(self._answers)
                self._answered.notify_all()
        if give_back is not None and not give_back(answer):
            self.leave(answer.id, give_back)


def _shorten(known: OrderedDict[int, A]) -> None:
    """Of a server that never answers, or of answers that nobody takes."""
    while len(known) > MAX_ANSWERS:
        known.popitem(last=False)


def fetch_arena(path: str, name: str) -> tuple[int, int, str]:
    """A descriptor of the arena (the caller's to close), its size in bytes and its id. Raises TransferError."""
    try:
        connection, fd, welcome = _greet(path, wire.Hello(name, ""))
    except (OSError, EOFError, ProtocolError) as error:
        raise TransferError(f"cannot reach the cache server at {path}: {error}") from error
    connection.close()
    return fd, welcome.arena_bytes, welcome.arena_id


def ask_figures(path: str) -> dict[str, float]:
    """The server's counters and sizes. Raises TransferError."""
    return _ask_once(path, wire.Figures, wire.Ask()).values


def drop_all(path: str) -> dict[str, float]:
    """Makes the server forget every complete block and label, and its tiers every block; returns its figures when that
    is done, or DROP_TIMEOUT_S later. Raises TransferError."""
    deadline_s = time.monotonic() + DROP_TIMEOUT_S
    figures = _ask_once(path, wire.Figures, wire.Drop(), wire.Ask()).values
    while figures.get("clearing", 0) and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
        figures = ask_figures(path)
    return figures


def labels(path: str) -> list[wire.LabelFigures]:
    """Every label of the server, the oldest first. Raises TransferError."""
    return _ask_once(path, wire.Labels, wire.AskLabels()).labels


def drop_label(path: str, name: str, tenant: bytes | None = None) -> bool:
    """Makes the server forget a label and its blocks, in the arena and below it; blocks that another label names stay.
    tenant: whose label (keys.tenant_of); None: everybody's of that name. False if there is none. Raises
    TransferError."""
    return _ask_once(path, wire.Labelled, wire.DropLabel(name, tenant)).num_labels > 0


def pin_label(path: str, name: str, pinned: bool, tenant: bytes | None = None) -> bool:
    """Makes the server keep a label's blocks, those to come too, or let them go. False if there is none. Raises
    Overloaded if labels would pin more than half of the arena, and TransferError."""
    answer = _ask_once(path, wire.Labelled, wire.Pin(name, pinned, tenant))
    if answer.why:
        raise Overloaded(answer.why)
    return answer.num_labels > 0


def _ask_once(path: str, kind: type[A], *messages: wire.ToServer) -> A:
    """The answer, of this kind, to the last of the messages."""
    try:
        connection, fd, _ = _greet(path, wire.Hello("baton cache", ""))
        os.close(fd)
        with connection:
            connection.sendall(b"".join(wire.frame(message) for message in messages))
            answer = _read_one(connection)
    except (OSError, EOFError, ProtocolError) as error:
        raise TransferError(f"cannot reach the cache server at {path}: {error}") from error
    if not isinstance(answer, kind):
        raise TransferError(f"the cache server at {path} answers {type(answer).__name__}")
    return answer


def _greet(path: str, hello: wire.Hello) -> tuple[socket.socket, int, wire.Welcome]:
    """A connection that may wait up to CONNECT_TIMEOUT_S, the arena's descriptor, and the server's answer."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    fds: list[int] = []
    try:
        connection.settimeout(CONNECT_TIMEOUT_S)
        connection.connect(path)
        if peer_uid(connection) != os.getuid():
            raise ProtocolError("its socket belongs to another user")
        _, fds, _, _ = socket.recv_fds(connection, 1, 1, socket.MSG_CMSG_CLOEXEC)
        if not fds:
            raise ProtocolError("it sent no memory")
        connection.sendall(wire.frame(hello))
        welcome = _read_one(connection)
        if not isinstance(welcome, wire.Welcome):
            raise ProtocolError(f"it says {type(welcome).__name__} instead of Welcome")
    except BaseException:
        for fd in fds:
            os.close(fd)
        connection.close()
        raise
    return connection, fds[0], welcome


def _read_one(connection: socket.socket) -> wire.ToClient:
    head = _exactly(connection, wire.LENGTH.size)
    return wire.decode_at_client(_exactly(connection, wire.frame_bytes(head)))


def _exactly(connection: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        chunk = connection.recv(num_bytes - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return data
