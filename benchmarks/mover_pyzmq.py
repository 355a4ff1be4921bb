"""pyzmq used directly as a peer of `baton bench transfer`, in the pattern of Baton's zmq transport and nothing more.

    PUSH ── [layer and block numbers][pieces gathered, 1 MiB at most] ──▶ PULL, scattered into place
    PULL ◀── one word when everything is there ── PUSH

No tags, no checks, no digests, no acknowledgement of single frames, no limit but ZMQ's own.
"""

from __future__ import annotations

import collections
import struct

import zmq

from benchmarks.kv_pool import Pool
from benchmarks.mover import WAIT_S, Ground, Job
from cluster.ports import LOOPBACK
from core.errors import TransferError
from transport.regions import Span
from transport.zmq_transfer import gather, scatter
from transport.zmq_wire import FRAME_BYTES, WINDOW_BYTES

_WAIT_MS = int(WAIT_S * 1000)


class PyzmqSender:
    """See benchmarks/mover.py."""

    def __init__(self, pool: Pool) -> None:
        self._regions = pool.regions()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._data = self._context.socket(zmq.PUSH)
        self._words = self._context.socket(zmq.PULL)
        self._words.setsockopt(zmq.RCVTIMEO, _WAIT_MS)
        self._data.setsockopt(zmq.SNDTIMEO, _WAIT_MS)
        self._under_way: collections.deque[tuple[zmq.MessageTracker, memoryview]] = collections.deque()

    def connect(self, description: bytes) -> None:
        data, words = description.decode().split()
        self._data.connect(data)
        self._words.connect(words)

    def write(self, job: Job, layers: range, *, is_last: bool) -> None:
        for layer in layers:
            span = Span(self._regions[layer], 0, self._regions[layer].block_bytes)
            for first, last in frames(span, len(job.local_ids)):
                header = struct.pack(f"{last - first + 1}I", layer, *job.remote_ids[first:last])
                self._data.send(header, zmq.SNDMORE)
                payload = gather(span, job.local_ids[first:last], self._room)
                self._under_way.append((self._data.send(payload, copy=False, track=True), payload))

    def finish(self) -> bool:
        try:
            self._words.recv()
        except zmq.Again:
            raise TransferError("the receiver says nothing") from None
        return False

    def close(self) -> None:
        self._context.destroy(0)

    def _room(self, num_bytes: int) -> memoryview:
        """What ZMQ has sent is filled again: a new megabyte costs more than gathering into it. As many frames are under
        way as Baton allows itself."""
        if len(self._under_way) >= WINDOW_BYTES // FRAME_BYTES:
            tracker, room = self._under_way.popleft()
            tracker.wait(WAIT_S)
            if room.nbytes == num_bytes and not room.readonly:
                return room
        return memoryview(bytearray(num_bytes))


class PyzmqReceiver:
    """See benchmarks/mover.py."""

    def __init__(self, pool: Pool) -> None:
        self._regions = pool.regions()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._data = self._context.socket(zmq.PULL)
        self._words = self._context.socket(zmq.PUSH)
        self._data.setsockopt(zmq.RCVTIMEO, _WAIT_MS)
        for each in (self._data, self._words):
            each.bind(f"tcp://{LOOPBACK}:*")
        self._num_left = 0

    def describe(self) -> bytes:
        return " ".join(each.getsockopt_string(zmq.LAST_ENDPOINT) for each in (self._data, self._words)).encode()

    def expect(self, job: Job) -> None:
        self._num_left = job.num_layers * len(job.remote_ids)

    def receive(self) -> None:
        while self._num_left > 0:
            try:
                header, payload = self._data.recv_multipart(copy=False)
            except zmq.Again:
                raise TransferError("the sender says nothing") from None
            layer, *ids = struct.unpack(f"{len(header) // 4}I", header.buffer)
            scatter(payload, Span(self._regions[layer], 0, self._regions[layer].block_bytes), ids)
            self._num_left -= len(ids)
        self._words.send(b"")

    def close(self) -> None:
        self._context.destroy(0)


def frames(span: Span, num_pieces: int) -> list[tuple[int, int]]:
    """Pieces first to last (excluded) of each frame; a piece is never larger than a frame here."""
    step = max(FRAME_BYTES // span.num_bytes, 1)
    return [(first, min(first + step, num_pieces)) for first in range(0, num_pieces, step)]


def sender(ground: Ground) -> PyzmqSender:
    return PyzmqSender(ground.pool)


def receiver(ground: Ground) -> PyzmqReceiver:
    return PyzmqReceiver(ground.pool)
