"""One UCX worker and the endpoints on it, in our words.

    UcxWorker   progress, arm, probe ──▶ what has arrived, received into place
    UcxPeer     one endpoint: batches of frames out, payloads out; everything ends with `close`

Memory model: a message waits in UCX's own memory until it is received; a received one is copied at once into the
memory given for it. What is being sent must stay as it is until it has left, or until the peer is closed.
UCX keeps whatever an endpoint sends that nobody asked for; `sweep` throws away what no connection of ours will take.
Threading: the transport's I/O thread alone.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Container
from typing import Any, NamedTuple

from core.errors import TransferError
from transport.regions import view
from transport.ucx_library import Lease, load, load_arrays
from transport.ucx_wire import (
    BATCH_BYTES,
    EVERY_BIT,
    ID_MASK,
    ID_SHIFT,
    MAX_MESSAGE_BYTES,
    PAYLOAD_BIT,
    ToReceiver,
    ToSender,
    batch,
    control_tag,
    encode,
    payload_tag,
)

MAX_SENDS = 1024
PROGRESS_LIMIT = 16
SWEEP_LIMIT = 64
MAX_LEFT_BEHIND = 1 << 16


class Control(NamedTuple):
    """A batch of frames; `message` is overwritten by the next one."""

    id: int
    message: memoryview


class UcxWorker:
    """Raises TransferError if the library refuses."""

    def __init__(self, lease: Lease) -> None:
        self._library = load()
        self.is_tcp_alone = lease.is_tcp_alone
        try:
            self._worker = self._library.UCXWorker(lease.context)
            self._worker.init_blocking_progress_mode()
            self.fd = int(self._worker.epoll_file_descriptor)
            self.address = bytes(self._worker.address.tobytes())
        except Exception as error:
            raise TransferError(f"UCX gives no worker: {error}") from error
        self._control = bytearray(MAX_MESSAGE_BYTES)
        self._control_array = array(self._control)
        self._sink = array(bytearray(MAX_MESSAGE_BYTES))
        self._running_control: tuple[Any, int, int] | None = None
        self._ending: list[_Ending] = []
        self._has_moved = False

    def progress(self) -> bool:
        """Lets UCX do what can be done now; whether that, or an `advance` since the last time, was anything."""
        for _ in range(PROGRESS_LIMIT):
            if not self.advance():
                break
        has_moved, self._has_moved = self._has_moved, False
        return has_moved

    def advance(self) -> bool:
        """One step of `progress`, for those who keep UCX waiting."""
        has_moved = bool(self._worker.progress_once())
        self._has_moved |= has_moved
        return has_moved

    def arm(self) -> bool:
        """Whether `fd` will tell of the next event; False if there is one already."""
        return bool(self._worker.arm())

    def connect(self, address: bytes) -> Any:
        """An endpoint of the library. Raises TransferError if there is no way to that address."""
        try:
            known = self._library.UCXAddress.create_from_buffer(address)
            return self._library.UCXEndpoint.create_from_worker_address(self._worker, known, True)
        except Exception as error:
            raise TransferError(f"UCX finds no way to the peer: {error}") from error

    def next_control(self) -> Control | None:
        """The next batch of frames of any peer. An overlong one is empty: no batch is."""
        if self._running_control is None:
            found = self._worker.tag_probe(*self._match(0, PAYLOAD_BIT))
            if not found.matched:
                return None
            request = self._worker.tag_recv(self._control_array, found.sender_tag)
            self._running_control = request, found.sender_tag.value >> ID_SHIFT, found.length
        request, id_, num_bytes = self._running_control
        if not request.completed:
            return None
        self._running_control = None
        is_whole = num_bytes <= MAX_MESSAGE_BYTES and failure_of(request) == ""
        return Control(id_, memoryview(self._control)[: num_bytes if is_whole else 0])

    def arrived(self, id_: int, number: int) -> int | None:
        """The size of a payload, once it is here (or, where it waits at its sender, announced)."""
        found = self._worker.tag_probe(*self._match(payload_tag(id_, number), EVERY_BIT))
        return int(found.length) if found.matched else None

    def receive(self, id_: int, number: int, into: Any) -> Any:
        """Receives an arrived payload; a request of the library."""
        return self._worker.tag_recv(into, self._library.UCXXTag(payload_tag(id_, number)))

    def discard(self, id_: int, number: int) -> Any:
        """Receives an arrived payload that nobody wants."""
        return self.receive(id_, number, self._sink)

    def discard_all(self, id_: int) -> None:
        """Everything that has arrived under an id that is given up."""
        for _ in range(MAX_LEFT_BEHIND):
            if not self._throw_away(id_ << ID_SHIFT, ID_MASK, ()):
                return

    def end(self, endpoint: Any, receives: list[Any], then: Callable[[], None]) -> None:
        """Closes an endpoint; `then` is called once nothing is received from it any more.

        UCX has crashed where an endpoint was closed in the middle of a rendezvous. Where there may be one, receives
        come to their end first: by their data, or by the error that tells of the peer's end. Over TCP there is none,
        and the close itself ends those that wait.
        """
        self._ending.append(_Ending(endpoint, receives, then))
        self.reap()

    def reap(self) -> None:
        """Closes endpoints that may be closed now, and lets go of those from which nothing is received any more."""
        for ending in list(self._ending):
            if not ending.is_closed and (self.is_tcp_alone or ending.is_quiet()):
                ending.endpoint.close_blocking()
                ending.is_closed = True
                self._worker.cancel_inflight_requests()  # those of an endpoint that was lost before its close
            if ending.is_closed and ending.is_quiet():
                self._ending.remove(ending)
                ending.then()

    def is_ending(self) -> bool:
        """Whether endpoints wait for their last receives."""
        return bool(self._ending)

    def abandon(self) -> None:
        """Endpoints that still receive are never closed: their memory stays UCX's for the life of this process."""
        _abandoned.extend(self._ending)
        self._ending.clear()

    def sweep(self, known: Container[int]) -> int:
        """Throws away what came late for connections that are over; how many."""
        count = 0
        while count < SWEEP_LIMIT and self._throw_away(0, 0, known):
            count += 1
        return count

    def _throw_away(self, tag: int, mask: int, known: Container[int]) -> bool:
        found = self._worker.tag_probe(*self._match(tag, mask))
        if not found.matched or found.sender_tag.value >> ID_SHIFT in known:
            return False
        self._worker.tag_recv(self._sink, found.sender_tag)
        return True

    def _match(self, tag: int, mask: int) -> tuple[Any, Any]:
        return self._library.UCXXTag(tag), self._library.UCXXTagMask(mask)


class _Ending:
    """An endpoint that is about to end."""

    def __init__(self, endpoint: Any, receives: list[Any], then: Callable[[], None]) -> None:
        self.endpoint = endpoint
        self.then = then
        self.is_closed = False
        self._receives = receives

    def is_quiet(self) -> bool:
        """Whether UCX writes nothing into our memory any more."""
        return all(request.completed for request in self._receives)


_abandoned: list[_Ending] = []


class UcxPeer:
    """The way to one peer. id_: under which it wants to be written to. Raises TransferError if there is none."""

    def __init__(self, worker: UcxWorker, address: bytes, id_: int) -> None:
        self._library = load()
        self._worker = worker
        self._id = id_
        self._endpoint = worker.connect(address)
        self._sends: collections.deque[tuple[Any, object]] = collections.deque()
        self._frames: list[bytes] = []
        self._num_bytes = 0
        self._why_failed = ""

    def say(self, frame: ToReceiver | ToSender) -> None:
        """Adds a frame to the next batch."""
        encoded = encode(frame)
        if self._num_bytes + len(encoded) > BATCH_BYTES:
            self.flush()
        self._frames.append(encoded)
        self._num_bytes += len(encoded)

    def flush(self) -> None:
        """Sends the frames that wait."""
        if self._frames:
            message = bytearray(batch(self._frames))
            self._frames, self._num_bytes = [], 0
            self._send(array(message), control_tag(self._id), message)

    def send_payload(self, number: int, payload: memoryview) -> None:
        """A payload whose frame has been said, and is sent before it."""
        self.flush()
        self._send(array(payload), payload_tag(self._id, number), payload)

    def receive_ahead(self, tag: int, into: Any) -> Any:
        """Asks for a payload of this peer that may not be here yet; a request of the library, which the peer's `close`
        ends. Raises TransferError if the library refuses."""
        try:
            return self._endpoint.tag_recv(into, self._library.UCXXTag(tag))
        except Exception as error:  # ucxx raises a class of its own per status
            raise TransferError(f"UCX receives nothing from it: {error}") from error

    def failure(self) -> str:
        """Why nothing can be sent any more; empty while it works. Forgets what has left."""
        while self._sends and self._sends[0][0].completed:
            request, _ = self._sends.popleft()
            self._why_failed = self._why_failed or failure_of(request)
        if self._why_failed:
            return self._why_failed
        if len(self._sends) > MAX_SENDS:
            return "it takes nothing that it asked for"
        return "" if self._endpoint.alive else "UCX has lost it"

    def is_sending(self) -> bool:
        """Whether something has not left yet."""
        return bool(self._sends)

    def close(self, receives: list[Any], then: Callable[[], None]) -> None:
        """Ends it, with these receives from it, then calls `then`: what was being sent may be changed."""
        self._worker.end(self._endpoint, receives, then)

    def _send(self, what: Any, tag: int, keep: object) -> None:
        try:
            self._sends.append((self._endpoint.tag_send(what, self._library.UCXXTag(tag)), keep))
        except Exception as error:  # noqa: BLE001 - ucxx raises a class of its own per status
            self._why_failed = self._why_failed or str(error) or type(error).__name__


def array(memory: bytearray | memoryview) -> Any:
    """Memory as the library takes it: an address and a size, never read here (it may be a GPU's)."""
    return load_arrays().Array(memory)


def place(address: int, num_bytes: int) -> Any:
    """The same for memory at an address."""
    return array(view(address, num_bytes))


def failure_of(request: Any) -> str:
    """Why a completed request has failed; empty if it has not."""
    try:
        request.check_error()
    except Exception as error:  # noqa: BLE001 - ucxx raises a class of its own per status
        return str(error) or type(error).__name__
    return ""
