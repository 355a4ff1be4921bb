"""The cache server of one host: owns the arena and its index; engines map the arena and copy blocks themselves.

    client ──▶ unix socket ──▶ byte + arena's descriptor, Hello/Welcome ──▶ Search, Reserve, Commit, ... ──▶ Index

It never touches a block's bytes. A client whose connection ends loses its pins at once and its reservations after a
moment. Whoever started the server holds the arena's and the ledger's descriptors: a restarted server takes both over.

Memory model: arena and ledger are memfds of the starter; the arena's pages are made present piece by piece, so that
no engine meets a page fault that must first find memory.
Threading: one event loop; one more thread populates the arena and ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from dataclasses import asdict
from pathlib import Path

from core.clock import Clock
from core.errors import ConfigError, ProtocolError
from kvcache import wire
from kvcache.index import Index
from kvcache.keys import split_keys
from kvcache.ledger import Ledger, ledger_bytes
from kvcache.ranges import aligned
from transport.mapping import Mapping, make_memfd
from transport.shm_listener import peer_uid

EXPIRE_PERIOD_S = 0.25
MAX_CLIENTS = 1024
HELLO_TIMEOUT_S = 5.0
MAX_UNSENT_BYTES = 8 << 20
"""Answers that a client does not read: beyond this it is not heard any more."""


class ArenaFds:
    """The two memfds of one arena, for whoever starts the server. Raises TransferError if there is no memory."""

    def __init__(self, arena_bytes: int) -> None:
        self.arena = make_memfd(arena_bytes)
        self.ledger = make_memfd(ledger_bytes(arena_bytes))

    def close(self) -> None:
        """The memory goes with its last mapping."""
        os.close(self.arena)
        os.close(self.ledger)


class CacheServer:
    """Serves the arena behind these descriptors on a unix socket at `path`."""

    def __init__(self, arena_fd: int, ledger_fd: int, path: Path, clock: Clock) -> None:
        self._arena_fd = arena_fd
        self._arena_bytes = os.fstat(arena_fd).st_size
        self._ledger_memory = Mapping(ledger_fd, os.fstat(ledger_fd).st_size)
        self._ledger = Ledger(self._ledger_memory)
        self._path = path
        self._clients: set[asyncio.Task[None]] = set()
        self._num_connections = 0
        self.index = Index(self._arena_bytes, self._ledger, clock)

    async def serve(self) -> None:
        """Until it is cancelled. Raises ConfigError if somebody else listens there."""
        listener = self._listen()
        threading.Thread(target=self._populate, name="baton-cache-populate", daemon=True).start()
        expiring = asyncio.create_task(self._expire())
        try:
            while True:
                connection, _ = await asyncio.get_running_loop().sock_accept(listener)
                self._accept(connection)
        finally:
            expiring.cancel()
            listener.close()
            self._path.unlink(missing_ok=True)
            for task in list(self._clients):
                task.cancel()

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(os.fspath(self._path))
        except OSError:
            if _is_alive(self._path):
                listener.close()
                raise ConfigError(f"a cache server is listening at {self._path} already") from None
            self._path.unlink(missing_ok=True)
            try:
                listener.bind(os.fspath(self._path))
            except OSError as error:
                raise ConfigError(f"cannot listen at {self._path}: {error}") from error
        listener.listen(128)
        listener.setblocking(False)
        return listener

    def _accept(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        if len(self._clients) >= MAX_CLIENTS or peer_uid(connection) != os.getuid():
            connection.close()
            return
        self._num_connections += 1
        task = asyncio.create_task(self._serve_client(connection, self._num_connections))
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)

    async def _serve_client(self, connection: socket.socket, owner: int) -> None:
        """One client, from its descriptor to its end. Its garbage ends this connection and nothing else."""
        writer = None
        try:
            socket.send_fds(connection, [b"b"], [self._arena_fd])
            reader, writer = await asyncio.open_connection(sock=connection, limit=wire.MAX_FRAME_BYTES)
            client = _Client(self.index, self._ledger.arena_id, owner)
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                first = await _read(reader)
            writer.write(wire.frame(client.welcome(first, self._arena_bytes)))
            while True:
                answer = client.answer(await _read(reader))
                if answer is not None:
                    writer.write(wire.frame(answer))
                if writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
                    return
        except (OSError, EOFError, ProtocolError, TimeoutError):
            return
        finally:
            self.index.forget_owner(owner)
            if writer is None:
                connection.close()
            else:
                writer.transport.abort()

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(EXPIRE_PERIOD_S)
            self.index.expire()

    def _populate(self) -> None:
        """Best effort: where memory is short, pages come when they are written."""
        with contextlib.suppress(Exception):  # a daemon thread that only saves others' time
            memory = Mapping(self._arena_fd, self._arena_bytes)
            memory.populate()
            memory.close()


class _Client:
    """One connection's words, turned into the index's."""

    def __init__(self, index: Index, arena_id: str, owner: int) -> None:
        self._index = index
        self._arena_id = arena_id
        self._owner = owner
        self._block_bytes = 0

    def welcome(self, message: wire.ToServer, arena_bytes: int) -> wire.Welcome:
        """Raises ProtocolError if this is no greeting."""
        if not isinstance(message, wire.Hello):
            raise ProtocolError("the first message must be Hello")
        if message.version != wire.VERSION:
            why = f"this cache server speaks version {wire.VERSION}, {message.name} {message.version}"
            return wire.Welcome(self._arena_id, arena_bytes, why)
        if aligned(message.block_bytes) > arena_bytes:
            why = f"one block of {message.name} has {message.block_bytes} bytes, the whole arena {arena_bytes}"
            return wire.Welcome(self._arena_id, arena_bytes, why)
        self._block_bytes = message.block_bytes
        return wire.Welcome(self._arena_id, arena_bytes)

    def answer(self, message: wire.ToServer) -> wire.ToClient | None:
        """Does what one message asks for. Raises ProtocolError if it cannot be meant so."""
        match message:
            case wire.Search():
                return self._search(message)
            case wire.Reserve():
                return wire.Granted(message.id, self._reserve(_keys(message.keys)))
            case wire.Ask():
                return wire.Figures(figures(self._index))
            case wire.Hello():
                raise ProtocolError("Hello was said already")
            case _:
                self._obey(message)
                return None

    def _search(self, message: wire.Search) -> wire.Found:
        keys = _keys(message.keys)
        found = self._index.search(self._owner, message.id, keys)
        slots = [wire.Slot(entry.offset, entry.digest) for entry in found]
        if not message.reserve:
            return wire.Found(message.id, slots)
        rest = self._reserve(keys[len(found) :])
        return wire.Found(message.id, slots, [wire.Grant(g.index + len(found), g.offset) for g in rest])

    def _reserve(self, keys: list[bytes]) -> list[wire.Grant]:
        if not self._block_bytes:
            raise ProtocolError("a client without blocks cannot write any")
        return [wire.Grant(*granted) for granted in self._index.reserve(self._owner, keys, self._block_bytes)]

    def _obey(self, message: wire.ToServer) -> None:
        """Messages without an answer."""
        index = self._index
        match message:
            case wire.Commit():
                for block in message.blocks:
                    index.commit(self._owner, block.key, block.offset, block.digest)
                index.touch([block.key for block in message.blocks])
            case wire.Abandon():
                index.abandon(self._owner, _keys(message.keys))
            case wire.Release():
                index.release(self._owner, message.id)
            case wire.Touch():
                index.touch(_keys(message.keys))
            case wire.Bad():
                for block in message.blocks:
                    index.quarantine(block.key, block.offset, block.digest)
            case wire.Drop():
                index.drop(index.keys())


def figures(index: Index) -> dict[str, float]:
    """What `baton cache stats` shows."""
    usage = {f"{name}_bytes": float(value) for name, value in asdict(index.usage).items()}
    counts = {f"{name}_blocks": float(value) for name, value in asdict(index.counts).items()}
    return {"capacity_bytes": float(index.capacity_bytes), "blocks": float(len(index))} | usage | counts


def _keys(joined: bytes) -> list[bytes]:
    try:
        return split_keys(joined)
    except ValueError as error:
        raise ProtocolError(str(error)) from error


async def _read(reader: asyncio.StreamReader) -> wire.ToServer:
    head = await reader.readexactly(wire.LENGTH.size)
    return wire.decode_at_server(await reader.readexactly(wire.frame_bytes(head)))


def _is_alive(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except OSError:
            return False
        return True
