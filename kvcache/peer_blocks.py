"""Sends blocks of this host's arena to peers that ask, each over a stream of its own thread.

    stream's thread: Fetch ──▶ event loop: pin ──▶ Found, bytes straight out of the arena, Sealed ──▶ event loop: unpin

Memory model: a block is pinned while it is sent. A pin that is lost all the same costs a miss: the seal covers key and
bytes. Nothing is copied but into the kernel.
Threading: a thread per stream; the index is asked and told on the server's event loop only. A stream that ends, or
takes longer than SEND_TIMEOUT_S for a block, gives its pin back.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import secrets
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from core.errors import ProtocolError, TransferError
from kvcache import peer_words as words
from kvcache.entry import Entry
from kvcache.index import Index
from kvcache.tier import seal_of
from transport.mapping import Mapping
from transport.regions import view
from transport.stream import Stream, StreamServer

MAX_STREAMS = 256
JOIN_TIMEOUT_S = 2.0
IDLE_S = 120.0
"""A stream that asks for nothing for so long is closed; its asker connects again."""

SEND_TIMEOUT_S = 5.0
"""For one block. An asker that takes longer has given up long ago."""

LOOP_TIMEOUT_S = 5.0
_LEASE = 1

T = TypeVar("T")


@dataclass
class ServedCounts:
    """Since the server started, in blocks and bytes, over all askers."""

    blocks: int = 0
    num_bytes: int = 0
    missing: int = 0
    failed: int = 0
    malformed: int = 0


class BlockServer:
    """Serves blocks on `host`, at `wanted_port` if it is free. Raises ConfigError if it cannot listen there."""

    def __init__(self, host: str, wanted_port: int, index: Index, arena: Mapping) -> None:
        self.counts = ServedCounts()
        self.token = secrets.token_hex(16)
        self._index = index
        self._arena = arena
        self._owners = itertools.count(-1, -1)
        self._sending: set[int] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server = StreamServer(host, self._serve, MAX_STREAMS, wanted_port)
        self.port = self._server.port

    @property
    def num_sending(self) -> int:
        """Blocks that are pinned for askers now."""
        return len(self._sending)

    def start(self) -> None:
        """From within the event loop."""
        self._loop = asyncio.get_running_loop()
        self._server.start()

    def close(self) -> None:
        """Ends every stream."""
        self._server.close()

    def _serve(self, stream: Stream) -> None:
        """One stream, until it ends, which raises."""
        owner = next(self._owners)
        try:
            join = words.decode_asked(stream.receive(JOIN_TIMEOUT_S))
            if not isinstance(join, words.Join) or not hmac.compare_digest(join.token.encode(), self.token.encode()):
                raise ProtocolError("it does not join with this server's token")
            while True:
                fetch = words.decode_asked(stream.receive(IDLE_S))
                if not isinstance(fetch, words.Fetch):
                    raise ProtocolError("it joins twice")
                self._answer(stream, owner, fetch)
        except ProtocolError:
            self._tell_loop(self._count_malformed)
            raise
        finally:
            self._tell_loop(lambda: self._forget(owner))

    def _answer(self, stream: Stream, owner: int, fetch: words.Fetch) -> None:
        entry = self._ask_loop(lambda: self._pin(owner, fetch))
        if entry is None:
            stream.send(words.encode(words.Missing()), SEND_TIMEOUT_S)
            return
        is_sent = False
        try:
            stream.send(words.encode(words.Found()), SEND_TIMEOUT_S)
            block = view(self._arena.address + entry.offset, entry.num_bytes)
            body = stream.send_block(block, SEND_TIMEOUT_S)
            sealed = words.Sealed(entry.digest, seal_of(fetch.key, entry.digest, len(block), body))
            stream.send(words.encode(sealed), SEND_TIMEOUT_S)
            is_sent = True
        finally:
            self._tell_loop(lambda: self._unpin(owner, entry, is_sent))

    def _ask_loop(self, call: Callable[[], T]) -> T:
        """Its result, once the event loop has run it. Raises TransferError if the server ends."""

        async def run() -> T:
            return call()

        assert self._loop is not None, "streams are served after start only"
        running = run()
        try:
            asked = asyncio.run_coroutine_threadsafe(running, self._loop)
        except RuntimeError as error:  # the loop is closed
            running.close()
            raise TransferError("the cache server has ended") from error
        try:
            return asked.result(LOOP_TIMEOUT_S)
        except (TimeoutError, CancelledError) as error:
            raise TransferError("the cache server does not answer") from error

    def _tell_loop(self, call: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop is closed, and the index with it
            assert self._loop is not None, "streams are served after start only"
            self._loop.call_soon_threadsafe(call)

    # On the event loop.

    def _pin(self, owner: int, fetch: words.Fetch) -> Entry | None:
        found = self._index.search(owner, _LEASE, [fetch.key])
        if found and found[0].num_bytes == fetch.num_bytes:
            self._sending.add(owner)
            return found[0]
        self._index.leases.release(owner, _LEASE)
        self.counts.missing += 1
        return None

    def _unpin(self, owner: int, entry: Entry, is_sent: bool) -> None:
        self._index.leases.release(owner, _LEASE)
        self._sending.discard(owner)
        self.counts.blocks += is_sent
        self.counts.num_bytes += entry.num_bytes * is_sent
        self.counts.failed += not is_sent

    def _forget(self, owner: int) -> None:
        self._index.forget_owner(owner)
        self._sending.discard(owner)

    def _count_malformed(self) -> None:
        self.counts.malformed += 1
