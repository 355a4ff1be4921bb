"""One asker of this host's blocks: what it has been told, and the blocks that are on their way to it.

    Subscribe ──▶ every key in pieces ──▶ changes, as the log has them
    Fetch ──▶ pinned ──▶ written into the asker's memory, sealed meanwhile ──▶ notice behind the data ──▶ unpinned

Memory model: blocks are sent straight out of the arena, pinned until the asker's transport has acknowledged them. A pin
that is lost all the same costs a miss: the seal covers key and bytes.
Threading: the server's event loop; seals are taken in threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from core.clock import Clock
from core.errors import TransferError
from kvcache import peer_words as words
from kvcache.change_log import ChangeLog
from kvcache.index import Entry, Index
from kvcache.keys import BlockKey, join_keys
from kvcache.tier import seal
from transport.base import Blocks, Endpoint, Transfer, TransferState
from transport.mapping import Mapping
from transport.regions import view

MAX_SENDING = 256
"""Blocks to one asker at the same time; four are what one asks for."""

SEND_TIMEOUT_S = 5.0
"""For one block. An asker that takes longer has given up long ago."""

MESSAGES_PER_TICK = 16
ARENA_REGION = 0
LANDING_REGION = 0


@dataclass
class ServedCounts:
    """Since the server started, in blocks and bytes, over all askers."""

    blocks: int = 0
    num_bytes: int = 0
    missing: int = 0
    failed: int = 0


@dataclass(frozen=True)
class Source:
    """What every session reads from. sealers: threads for checksums."""

    index: Index
    arena: Mapping
    log: ChangeLog
    sealers: Executor
    clock: Clock
    counts: ServedCounts


@dataclass
class _Sending:
    """One block under way. notice: written once the seal is known."""

    entry: Entry
    word: words.Fetch
    data: Transfer
    deadline_s: float
    notice: Transfer | None = None

    def state(self) -> TransferState:
        state = self.data.poll()
        if state is TransferState.DONE:
            return self.notice.poll() if self.notice is not None else TransferState.RUNNING
        return state

    def failure(self) -> str:
        return self.data.failure() or (self.notice.failure() if self.notice is not None else "")


class Session:
    """`owner`: a number for the index that nobody else has had; `send`: one word to the asker, False if it cannot be
    queued now."""

    def __init__(self, source: Source, owner: int, endpoint: Endpoint, send: Callable[[words.ToAsker], bool]) -> None:
        self._source = source
        self._owner = owner
        self.endpoint = endpoint
        self._send = send
        self._sending: dict[int, _Sending] = {}
        self._untold: list[BlockKey] | None = None
        self._is_first = True
        self._position: int | None = None
        self.is_over = False

    @property
    def num_sending(self) -> int:
        """Blocks that are pinned for this asker."""
        return len(self._sending)

    def subscribe(self) -> None:
        """Everything first, then what changes."""
        self._untold, self._is_first = self._source.index.keys(), True
        self._position = self._source.log.end

    def announce(self) -> bool:
        """Tells some news; whether there was any."""
        for count in range(MESSAGES_PER_TICK):
            if not self._tell():
                return count > 0
        return True

    def fetch(self, word: words.Fetch) -> None:
        """Begins to send one block, or says why not."""
        source = self._source
        if word.number in self._sending or len(self._sending) >= MAX_SENDING:
            self._send(words.Refused(word.number, "too many blocks are under way"))
            return
        (entry, *_) = [*source.index.search(self._owner, word.number, [word.key]), None]
        if entry is None or entry.num_bytes != word.num_bytes:
            source.index.release(self._owner, word.number)
            source.counts.missing += 1
            self._send(words.Missing(word.number))
            return
        local = Blocks(ARENA_REGION, (0,), entry.offset, entry.num_bytes)
        try:
            data = self.endpoint.write(word.tag, local, Blocks(LANDING_REGION, (word.place,), 0, entry.num_bytes))
        except TransferError as error:
            source.index.release(self._owner, word.number)
            self._send(words.Refused(word.number, str(error)[:1024]))
            return
        deadline_s = source.clock.monotonic_s() + SEND_TIMEOUT_S
        self._sending[word.number] = _Sending(entry, word, data, deadline_s)
        block = view(source.arena.address + entry.offset, entry.num_bytes)
        sealing = asyncio.get_running_loop().run_in_executor(source.sealers, seal, entry.key, entry.digest, block)
        sealing.add_done_callback(lambda done: self._sealed(word.number, done))

    def reap(self) -> None:
        """Ends what has arrived or failed. A block that takes too long ends the session."""
        now_s = self._source.clock.monotonic_s()
        for number, sending in list(self._sending.items()):
            state = sending.state()
            if state is TransferState.RUNNING:
                self.is_over = self.is_over or now_s > sending.deadline_s
                continue
            del self._sending[number]
            self._source.index.release(self._owner, number)
            if state is TransferState.DONE:
                self._source.counts.blocks += 1
                self._source.counts.num_bytes += sending.entry.num_bytes
            else:
                self._source.counts.failed += 1
                self._send(words.Refused(number, sending.failure()[:1024]))
        if self.endpoint.failure():
            self.is_over = True

    def close(self) -> None:
        """Its pins end; its endpoint is the caller's to close."""
        self.is_over = True
        self._sending.clear()
        self._source.index.forget_owner(self._owner)

    def _tell(self) -> bool:
        """One message of news, if there is any and it can be queued."""
        if self._untold is not None:
            if not self._send(words.Known(join_keys(self._untold[-words.MAX_KEYS :]), self._is_first)):
                return False
            del self._untold[-words.MAX_KEYS :]
            self._is_first = False
            self._untold = self._untold or None
            return True
        if self._position is None:
            return False
        changes = self._source.log.since(self._position, words.MAX_KEYS)
        if changes is None:
            self.subscribe()
            return True
        latest = dict(changes)
        added = join_keys(key for key, is_there in latest.items() if is_there)
        removed = join_keys(key for key, is_there in latest.items() if not is_there)
        if not changes or not self._send(words.Changed(added, removed)):
            return False
        self._position += len(changes)
        return True

    def _sealed(self, number: int, sealing: asyncio.Future[int]) -> None:
        """The notice goes behind the data, which may still be under way."""
        sending = self._sending.get(number)
        if sending is None or self.is_over or sealing.cancelled():
            return
        word, nothing = sending.word, Blocks(ARENA_REGION, (), 0, sending.entry.num_bytes)
        notice = words.encode(words.Sealed(sending.entry.digest, sealing.result()))
        try:
            sending.notice = self.endpoint.write(word.tag, nothing, nothing, notice)
        except TransferError:
            self.is_over = True
