"""A socket between the two halves of one instance, for words that cannot wait for the engine's next step.

    scheduler's half ── Named, Await, Meet ──▶ worker's half          abstract socket, uid checked on both sides
                     ◀──────── News ──────────                        one packet per word, MessagePack

An engine without requests takes no steps, yet paths are opened and measured when instances join.

Memory model: one connection; at most MAX_WORDS words of MAX_WORD_BYTES wait on the scheduler's half, the oldest are
dropped, and so is what is larger: some of it comes from peers.
Threading: `Door` belongs to one thread, but for `wake`. `DoorKey` has a lock; its calls never wait.
"""

from __future__ import annotations

import collections
import contextlib
import os
import secrets
import select
import socket
import threading

import msgspec

from core.errors import TransferError
from core.handoff import Peer
from core.path import Path
from transport.credentials import peer_uid

MAX_WORD_BYTES = 128 << 10
MAX_WORDS = 256
SAY_TIMEOUT_S = 1.0


class Named(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The boot id of this instance."""

    boot_id: str


class Await(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The instance of this boot id may probe us."""

    boot_id: str


class Meet(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A receiver that expects to be probed: one of its tensor-parallel ranks, whose transports these are with their
    descriptions, best first."""

    peer: Peer
    schemes: list[tuple[str, bytes]]
    rank: int = 0


class News(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """What is known of the paths; `is_first`: of a new table, of which more may follow."""

    is_first: bool
    paths: list[Path]


Word = Named | Await | Meet | News
_WORD = msgspec.msgpack.Decoder(Word)
_ENCODER = msgspec.msgpack.Encoder()


class Door:
    """The worker's half. `address` is what the scheduler's half needs."""

    def __init__(self) -> None:
        self.address = f"baton-door-{secrets.token_hex(16)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(b"\0" + self.address.encode())
        self._listener.listen(1)
        self._listener.setblocking(False)
        self._visitor: socket.socket | None = None
        self._bell_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._is_closed = False
        self._lock = threading.Lock()

    def is_attended(self) -> bool:
        """Whether the other half has come."""
        return self._visitor is not None

    def wake(self) -> None:
        """Ends `hear` at once. From any thread."""
        with self._lock:
            if not self._is_closed:
                os.eventfd_write(self._bell_fd, 1)

    def hear(self, timeout_s: float) -> list[Word]:
        """What has been said; waits for the first word, `timeout_s` at most."""
        poll = select.poll()
        for fd in (self._listener.fileno(), self._bell_fd, self._visitor.fileno() if self._visitor else -1):
            if fd >= 0:
                poll.register(fd, select.POLLIN)
        readable = [fd for fd, _ in poll.poll(timeout_s * 1e3)]
        if self._bell_fd in readable:
            os.eventfd_read(self._bell_fd)
        if self._listener.fileno() in readable:
            self._let_in()
        return self._read()

    def say(self, word: Word) -> None:
        """Waits a moment where the other half does not listen; then the word is lost."""
        if self._visitor is not None:
            self._visitor.settimeout(SAY_TIMEOUT_S)
            with contextlib.suppress(OSError):
                self._visitor.send(_ENCODER.encode(word))
            self._visitor.setblocking(False)

    def close(self) -> None:
        """Ends it."""
        with self._lock:
            self._is_closed = True
            os.close(self._bell_fd)
        self._listener.close()
        if self._visitor is not None:
            self._visitor.close()
            self._visitor = None

    def _let_in(self) -> None:
        """The latest one of our own user stays."""
        with contextlib.suppress(BlockingIOError):
            visitor, _ = self._listener.accept()
            if peer_uid(visitor) != os.getuid():
                visitor.close()
                return
            if self._visitor is not None:
                self._visitor.close()
            visitor.setblocking(False)
            self._visitor = visitor

    def _read(self) -> list[Word]:
        words: list[Word] = []
        while self._visitor is not None:
            wire = _receive(self._visitor)
            if wire is None:
                break
            if not wire:
                self._visitor.close()
                self._visitor = None
            else:
                words += _decoded(wire)
        return words


class DoorKey:
    """The scheduler's half."""

    def __init__(self, address: str) -> None:
        """Raises TransferError if the worker is not there."""
        self._lock = threading.Lock()
        self._waiting: collections.deque[bytes] = collections.deque(maxlen=MAX_WORDS)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(SAY_TIMEOUT_S)
        try:
            self._socket.connect(b"\0" + address.encode())
            if peer_uid(self._socket) != os.getuid():
                raise TransferError("the worker's door belongs to another user")
        except (OSError, TransferError) as error:
            self._socket.close()
            raise TransferError(f"cannot reach this instance's worker: {error}") from error
        self._socket.setblocking(False)

    def say(self, word: Word) -> None:
        """Sent now, or by `listen` as soon as the worker takes it."""
        wire = _ENCODER.encode(word)
        if len(wire) <= MAX_WORD_BYTES:
            with self._lock:
                self._waiting.append(wire)
                self._flush()

    def listen(self) -> list[Word]:
        """What has been said since the last call; sends what waits."""
        words: list[Word] = []
        with self._lock:
            self._flush()
            while wire := _receive(self._socket):
                words += _decoded(wire)
        return words

    def close(self) -> None:
        """Ends it."""
        with self._lock:
            self._waiting.clear()
            self._socket.close()

    def _flush(self) -> None:
        while self._waiting:
            try:
                self._socket.send(self._waiting[0])
            except BlockingIOError:
                return
            except OSError:  # the worker is gone, or the word is larger than a packet may be
                pass
            self._waiting.popleft()


def _receive(connection: socket.socket) -> bytes | None:
    """One packet; None if there is none now; empty if the connection has ended."""
    try:
        return connection.recv(MAX_WORD_BYTES)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def _decoded(wire: bytes) -> list[Word]:
    try:
        word: Word = _WORD.decode(wire)
    except msgspec.DecodeError:
        return []
    return [word]
