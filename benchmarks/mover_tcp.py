"""A plain TCP socket as a peer of `baton bench transfer`: pieces by address from memory, and straight into place.

Both ends know the order of the pieces (layer by layer, block by block), so nothing but the bytes travels, and one byte
back at the end.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

from benchmarks.kv_pool import Pool
from benchmarks.mover import WAIT_S, Ground, Job
from cluster.ports import LOOPBACK
from core.errors import TransferError
from transport.regions import view

_MOST_VIEWS = 1024
"""IOV_MAX on Linux."""


class TcpSender:
    """See benchmarks/mover.py."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._socket = socket.socket()
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.settimeout(WAIT_S)

    def connect(self, description: bytes) -> None:
        self._socket.connect((LOOPBACK, int(description)))

    def write(self, job: Job, layers: range, *, is_last: bool) -> None:
        for batch in batches(self._pool, layers, job.local_ids):
            left = batch
            while left:
                left = without(left, self._socket.sendmsg(left))

    def finish(self) -> bool:
        if self._socket.recv(1) != b"k":
            raise TransferError("the receiver hung up")
        return False

    def close(self) -> None:
        self._socket.close()


class TcpReceiver:
    """See benchmarks/mover.py."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._listener = socket.create_server((LOOPBACK, 0))
        self._socket: socket.socket | None = None
        self._job: Job | None = None

    def describe(self) -> bytes:
        return str(self._listener.getsockname()[1]).encode()

    def expect(self, job: Job) -> None:
        self._job = job

    def receive(self) -> None:
        if self._job is None:
            raise TransferError("nothing is expected")
        if self._socket is None:
            self._listener.settimeout(WAIT_S)
            self._socket, _ = self._listener.accept()
            self._socket.settimeout(WAIT_S)
        for batch in batches(self._pool, range(self._job.num_layers), self._job.remote_ids):
            left = batch
            while left:
                count = self._socket.recvmsg_into(left)[0]
                if count == 0:
                    raise TransferError("the sender hung up")
                left = without(left, count)
        self._socket.sendall(b"k")

    def close(self) -> None:
        self._listener.close()
        if self._socket is not None:
            self._socket.close()


def batches(pool: Pool, layers: range, ids: tuple[int, ...]) -> Iterator[list[memoryview]]:
    """Views of the pieces in order, as many at a time as one system call takes."""
    size, views = pool.shape.piece_bytes, list[memoryview]()
    for layer in layers:
        for block_id in ids:
            views.append(view(pool.address_of(layer, block_id), size))
            if len(views) == _MOST_VIEWS:
                yield views
                views = []
    if views:
        yield views


def without(views: list[memoryview], count: int) -> list[memoryview]:
    """What is left of the views after so many bytes."""
    index = 0
    while index < len(views) and count >= len(views[index]):
        count -= len(views[index])
        index += 1
    left = views[index:]
    if count:
        left[0] = left[0][count:]
    return left


def sender(ground: Ground) -> TcpSender:
    return TcpSender(ground.pool)


def receiver(ground: Ground) -> TcpReceiver:
    return TcpReceiver(ground.pool)
