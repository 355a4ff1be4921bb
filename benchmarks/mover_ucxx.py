"""ucxx used directly as a peer of `baton bench transfer`: frames by tag, a few under way, each scattered into place.

    sender    gathers pieces of one layer, 1 MiB at most, and sends each frame under one tag
    receiver  has a few receives posted, knows the frames' order, and scatters each as it comes

Both ends drive UCX themselves from their one thread (ucxx's polling mode; its own progress thread has 8 times the
latency), so both spin while a job lasts. A job's frames are cut per layer, whatever the number of writes.
"""

from __future__ import annotations

import collections
import ctypes
import importlib
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

from benchmarks.kv_pool import Pool
from benchmarks.mover import WAIT_S, Ground, Job
from core.errors import TransferError
from transport.base import Region
from transport.copying import copy_pairs
from transport.regions import Span
from transport.zmq_wire import FRAME_BYTES

_IN_FLIGHT = 8
_TAG = 7


class Frame(NamedTuple):
    """Pieces first to last (excluded) of one layer."""

    layer: int
    first: int
    last: int


def unavailable() -> str:
    """Why it cannot run here; empty if it can."""
    return "" if find_spec("ucxx") else "the package ucxx is not installed"


def _library() -> Any:
    """What ucxx is made of: its own asyncio layer costs more than a small transfer."""
    return importlib.import_module("ucxx._lib.libucxx")


class UcxxSender:
    """See benchmarks/mover.py."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._side = _Side(pool)
        self._endpoint: Any = None
        self._under_way: collections.deque[tuple[Any, _Buffer]] = collections.deque()

    def connect(self, description: bytes) -> None:
        address = _library().UCXAddress.create_from_buffer(description)
        self._endpoint = _library().UCXEndpoint.create_from_worker_address(self._side.worker, address, True)

    def write(self, job: Job, layers: range, *, is_last: bool) -> None:
        regions = self._pool.regions()
        for frame in frames(self._pool, layers, len(job.local_ids)):
            while len(self._under_way) >= _IN_FLIGHT:
                self._end_first()
            span = Span(regions[frame.layer], 0, self._pool.shape.piece_bytes)
            buffer = self._side.buffer()
            ids = job.local_ids[frame.first : frame.last]
            copy_pairs(span, ids, buffer.span(span.num_bytes, len(ids)), range(len(ids)))
            request = self._endpoint.tag_send(buffer.array(len(ids) * span.num_bytes), self._side.tag)
            self._under_way.append((request, buffer))
            self._side.worker.progress()

    def finish(self) -> bool:
        while self._under_way:
            self._end_first()
        return False

    def close(self) -> None:
        return

    def _end_first(self) -> None:
        request, buffer = self._under_way.popleft()
        self._side.complete(request)
        self._side.free.append(buffer)


class UcxxReceiver:
    """See benchmarks/mover.py."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._side = _Side(pool)
        self._job: Job | None = None

    def describe(self) -> bytes:
        return bytes(_library().UCXAddress.create_from_worker(self._side.worker).tobytes())

    def expect(self, job: Job) -> None:
        self._job = job

    def receive(self) -> None:
        if self._job is None:
            raise TransferError("nothing is expected")
        regions, size = self._pool.regions(), self._pool.shape.piece_bytes
        coming = frames(self._pool, range(self._job.num_layers), len(self._job.remote_ids))
        posted: collections.deque[tuple[Any, _Buffer, Frame]] = collections.deque()
        while True:
            while len(posted) < _IN_FLIGHT and (frame := next(coming, None)) is not None:
                buffer = self._side.buffer()
                array = buffer.array((frame.last - frame.first) * size)
                posted.append((self._side.worker.tag_recv(array, self._side.tag), buffer, frame))
            if not posted:
                return
            request, buffer, frame = posted.popleft()
            self._side.complete(request)
            ids = self._job.remote_ids[frame.first : frame.last]
            source = buffer.span(size, len(ids))
            copy_pairs(source, range(len(ids)), Span(regions[frame.layer], 0, size), ids)
            self._side.free.append(buffer)

    def close(self) -> None:
        return


class _Side:
    """One worker, driven by whoever waits, and its frame buffers."""

    def __init__(self, pool: Pool) -> None:
        library = _library()
        self.worker = library.UCXWorker(library.UCXContext({}, feature_flags=(library.Feature.TAG,)))
        self.tag = library.UCXXTag(_TAG)
        self.free: list[_Buffer] = []
        self._num_bytes = max(FRAME_BYTES, pool.shape.piece_bytes)

    def buffer(self) -> _Buffer:
        return self.free.pop() if self.free else _Buffer(self._num_bytes)

    def complete(self, request: Any) -> None:
        """Drives the worker until the request has ended. Raises TransferError."""
        deadline_s = time.monotonic() + WAIT_S
        while not request.completed:
            self.worker.progress()
            if time.monotonic() > deadline_s:
                raise TransferError("a ucxx request does not end")
        request.check_error()


class _Buffer:
    """Room for one frame."""

    def __init__(self, num_bytes: int) -> None:
        self._bytes = bytearray(num_bytes)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._bytes))

    def array(self, num_bytes: int) -> Any:
        return importlib.import_module("ucxx._lib.arr").Array(memoryview(self._bytes)[:num_bytes])

    def span(self, piece_bytes: int, num_pieces: int) -> Span:
        return Span(Region(0, self._address, piece_bytes, piece_bytes, num_pieces), 0, piece_bytes)


def frames(pool: Pool, layers: range, num_pieces: int) -> Iterator[Frame]:
    """In the order in which they travel."""
    step = max(FRAME_BYTES // pool.shape.piece_bytes, 1)
    for layer in layers:
        for first in range(0, num_pieces, step):
            yield Frame(layer, first, min(first + step, num_pieces))


def sender(ground: Ground) -> UcxxSender:
    return UcxxSender(ground.pool)


def receiver(ground: Ground) -> UcxxReceiver:
    return UcxxReceiver(ground.pool)
