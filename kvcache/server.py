"""The cache server of one host: owns the arena and its index; engines map the arena and copy blocks themselves.

    client ──▶ unix socket ──▶ byte + arena's descriptor, Hello/Welcome ──▶ Search, Reserve, Commit, ... ──▶ Index

It touches no block's bytes on an engine's way to the arena; other tiers are filled and read in threads. A client whose
connection ends loses its pins at once and its reservations after a moment. Whoever started the server holds the
arena's and the ledger's descriptors: a restarted server takes both over.

Memory model: arena and ledger are memfds of the starter; the arena's pages are made present in the background, so that
no engine meets a page fault that must first find memory.
Threading: one event loop; one thread populates the arena and ends; tiers and peers are served in others.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from core.clock import Clock
from core.errors import ConfigError, ProtocolError, TransferError
from kvcache import wire
from kvcache.connection import Client
from kvcache.hierarchy import Hierarchy
from kvcache.index import Index
from kvcache.label_notes import LabelNotes, half_bytes
from kvcache.labels import Labels
from kvcache.ledger import Ledger, ledger_bytes
from kvcache.peer_server import PeerServer
from kvcache.shape import KnownShapes
from kvcache.spec import CacheSpec
from kvcache.tier import Tier
from transport.credentials import peer_uid
from transport.mapping import Mapping, make_memfd

EXPIRE_PERIOD_S = 0.25
MAX_CLIENTS = 1024
HELLO_TIMEOUT_S = 5.0
MAX_UNSENT_BYTES = 8 << 20
"""Answers that a client does not read: beyond this it is not heard any more."""


class ArenaFds:
    """The two memfds of one arena, for whoever starts the server: the blocks, and what is known of them. Raises
    TransferError if there is no memory."""

    def __init__(self, arena_bytes: int) -> None:
        self.arena = make_memfd(arena_bytes)
        self.ledger = make_memfd(ledger_bytes(arena_bytes) + 2 * half_bytes(arena_bytes))

    def close(self) -> None:
        """The memory goes with its last mapping."""
        os.close(self.arena)
        os.close(self.ledger)


class CacheServer:
    """Serves the arena behind these descriptors on a unix socket at `path`."""

    def __init__(
        self,
        fds: tuple[int, int],
        path: Path,
        clock: Clock,
        tiers: Sequence[Tier] = (),
        shapes: KnownShapes | None = None,
        spec: CacheSpec | None = None,
    ) -> None:
        """fds: of arena and ledger. tiers: below the arena, the nearest first; closed with the server. shapes: where
        those tiers look up how a block lies. spec: its rules, and where other hosts' servers may ask for blocks. Raises
        ConfigError."""
        spec = spec or CacheSpec()
        self._arena_fd, ledger_fd = fds
        arena_bytes = os.fstat(self._arena_fd).st_size
        self._arena = Mapping(self._arena_fd, arena_bytes)
        self._ledger_memory = Mapping(ledger_fd, ledger_bytes(arena_bytes))
        self._ledger = Ledger(self._ledger_memory)
        notes_memory = Mapping(ledger_fd, os.fstat(ledger_fd).st_size)
        notes = LabelNotes(notes_memory, ledger_bytes(arena_bytes), half_bytes(arena_bytes))
        self._path = path
        self._clients: set[asyncio.Task[None]] = set()
        self._num_connections = 0
        self.index = Index(arena_bytes, self._ledger, clock, spec.rules)
        self.labels = Labels(self.index, clock, notes)
        self.hierarchy = Hierarchy(tiers, self.index, self._arena, clock, shapes)
        self.peer_server = PeerServer(spec.listen, self.index, self._arena, clock) if spec.listen else None

    async def serve(self) -> None:
        """Until it is cancelled. Raises ConfigError if somebody else listens there."""
        listener = self._listen()
        threading.Thread(target=self._populate, name="baton-cache-populate", daemon=True).start()
        self.hierarchy.down.start()
        if self.peer_server:
            self.peer_server.start()
        expiring = asyncio.create_task(self._expire())
        try:
            while True:
                try:
                    connection, _ = await asyncio.get_running_loop().sock_accept(listener)
                except OSError:  # no descriptor is left; one may be soon
                    await asyncio.sleep(EXPIRE_PERIOD_S)
                else:
                    self._accept(connection)
        finally:
            expiring.cancel()
            listener.close()
            self._path.unlink(missing_ok=True)
            for task in list(self._clients):
                task.cancel()
            if self.peer_server:
                self.peer_server.close()
            try:
                await self.hierarchy.down.drain()
            finally:
                self.hierarchy.close()

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
        client = Client(self.index, self.hierarchy, self.labels, owner)
        if self.peer_server:
            client.more_figures = self.peer_server.figures
        try:
            socket.send_fds(connection, [b"b"], [self._arena_fd])
            reader, writer = await asyncio.open_connection(sock=connection, limit=wire.MAX_FRAME_BYTES)
            client.answer_to(_sender(writer))
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                first = await _read(reader)
            client.greet(first, self._ledger.arena_id)
            while writer.transport.get_write_buffer_size() <= MAX_UNSENT_BYTES:
                client.hear(await _read(reader))
        except (OSError, EOFError, ProtocolError, TimeoutError):
            return
        finally:
            client.close()
            if writer is None:
                connection.close()
            else:
                writer.transport.abort()

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(EXPIRE_PERIOD_S)
            self.index.expire()
            expired = self.labels.expire()
            self.labels.note()
            if expired:
                self.hierarchy.forget(expired)

    def _populate(self) -> None:
        """Best effort: where memory is short, pages come when they are written."""
        with contextlib.suppress(TransferError):
            self._arena.populate()


def _sender(writer: asyncio.StreamWriter) -> Callable[[wire.ToClient], None]:
    return lambda message: writer.write(wire.frame(message))


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
