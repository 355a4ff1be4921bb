"""The barest way to the same bytes, as a yardstick for each tier: what no cache can be faster than.

    memcpy   memory ──▶ memory                    blocks of a layer, scattered as in a KV cache (benchmarks.memcpy)
    disk     files of a block each ──▶ memory     one preadv each, from the page cache as a tier just written is
    redis    values of a block each ──▶ memory    one GET after the other over one connection
    peer     TCP over loopback ──▶ memory         one stream

Threads: the reader is the caller's thread, on the engine's core; whoever sends runs where the system puts it.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path

from benchmarks import cores
from benchmarks.cache_results import Raw
from benchmarks.memcpy import CacheShape, Yardstick
from benchmarks.redis_process import redis_server
from cluster.ports import LOOPBACK
from core.clock import Clock
from core.errors import BatonError
from transport.mapping import Mapping, make_memfd
from transport.regions import view

PASSES = 5
_SEND_BYTES = 1 << 20
_MAX_LINE = 64


class Prompt:
    """One prompt's KV: so many blocks of so many layers, and memory to read it into."""

    def __init__(self, num_blocks: int, num_layers: int, layer_block_bytes: int) -> None:
        self.num_blocks = num_blocks
        self.num_layers = num_layers
        self.layer_block_bytes = layer_block_bytes
        self.block_bytes = num_layers * layer_block_bytes
        self._fd = make_memfd(self.num_bytes)
        self.memory = Mapping(self._fd, self.num_bytes)
        os.close(self._fd)
        self.memory.populate()

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    def place(self, index: int) -> memoryview:
        """Where one block goes."""
        return view(self.memory.address + index * self.block_bytes, self.block_bytes)

    def close(self) -> None:
        self.memory.close()


def memcpy(prompt: Prompt, clock: Clock, cache_bytes: int) -> Raw:
    """Both sides cold, block by block and layer by layer."""
    shape = CacheShape(prompt.num_layers, prompt.layer_block_bytes, prompt.num_blocks * 4)
    with closing(Yardstick(shape, clock, cache_bytes)) as yardstick, _on_engine_core():
        seconds = [yardstick.measure(prompt.num_blocks, prompt.num_blocks).cold_s for _ in range(PASSES)]
    return Raw("memcpy", prompt.num_bytes, tuple(seconds))


def disk(prompt: Prompt, clock: Clock, folder: Path) -> Raw:
    """Files that were written a moment ago, so the kernel still has them in memory, as it has a tier's."""
    paths = [folder / f"raw-{index}" for index in range(prompt.num_blocks)]
    for index, path in enumerate(paths):
        path.write_bytes(os.urandom(4096) + bytes(prompt.place(index)[4096:]))

    def read() -> None:
        for index, path in enumerate(paths):
            _read_file(path, prompt.place(index))

    try:
        return _timed("disk", prompt, clock, read)
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def redis(prompt: Prompt, clock: Clock, folder: Path) -> Raw:
    """Raises ConfigError without a server on this machine."""
    with redis_server(folder) as port, socket.create_connection((LOOPBACK, port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for index in range(prompt.num_blocks):
            head = b"*3\r\n$3\r\nSET\r\n" + _bulk(b"raw-%d" % index) + b"$%d\r\n" % prompt.block_bytes
            connection.sendall(head)
            connection.sendall(prompt.place(index))
            connection.sendall(b"\r\n")
            _line(connection)

        def read() -> None:
            for index in range(prompt.num_blocks):
                connection.sendall(b"*2\r\n$3\r\nGET\r\n" + _bulk(b"raw-%d" % index))
                if _line(connection) != b"$%d" % prompt.block_bytes:
                    raise BatonError("Redis gave back another value than it was given")
                _exactly(connection, prompt.place(index))
                _line(connection)

        return _timed("redis", prompt, clock, read)


def peer(prompt: Prompt, clock: Clock) -> Raw:
    """A byte asks for all of it, a stream answers."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        thread = threading.Thread(target=_send, args=(listener, prompt.num_bytes), daemon=True)
        thread.start()
        with socket.create_connection(listener.getsockname()) as connection:

            def read() -> None:
                connection.sendall(b"?")
                _exactly(connection, view(prompt.memory.address, prompt.num_bytes))

            result = _timed("peer", prompt, clock, read)
        thread.join(5.0)
    return result


def _timed(name: str, prompt: Prompt, clock: Clock, read: Callable[[], None]) -> Raw:
    """The first pass is not counted."""
    seconds = []
    with _on_engine_core():
        for _ in range(PASSES + 1):
            begun_s = clock.monotonic_s()
            read()
            seconds.append(clock.monotonic_s() - begun_s)
    return Raw(name, prompt.num_bytes, tuple(seconds[1:]))


def _on_engine_core() -> AbstractContextManager[None]:
    return cores.only({cores.pair()[0]})


def _read_file(path: Path, into: memoryview) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        at = 0
        while at < len(into):
            num_read = os.preadv(descriptor, [into[at:]], at)
            if num_read == 0:
                raise BatonError(f"{path} is shorter than it was written")
            at += num_read
    finally:
        os.close(descriptor)


def _send(listener: socket.socket, num_bytes: int) -> None:
    """As long as somebody asks."""
    source = bytes(_SEND_BYTES)
    connection, _ = listener.accept()
    with connection:
        while connection.recv(1):
            left = num_bytes
            while left:
                left -= connection.send(source[: min(left, _SEND_BYTES)])


def _bulk(text: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(text), text)


def _line(connection: socket.socket) -> bytes:
    """Up to the line's end, byte by byte: what follows belongs to the value."""
    line = b""
    while not line.endswith(b"\r\n"):
        if len(line) > _MAX_LINE:
            raise BatonError(f"Redis answers {line!r}")
        byte = connection.recv(1)
        if not byte:
            raise BatonError("Redis hung up")
        line += byte
    return line[:-2]


def _exactly(connection: socket.socket, into: memoryview) -> None:
    at = 0
    while at < len(into):
        num_read = connection.recv_into(into[at:])
        if not num_read:
            raise BatonError("the other side hung up")
        at += num_read
