"""Streams to one peer, over which its blocks are read: as many as fetches go on at once, kept for the next ones.

    fetch ──▶ an idle stream, or a new one ──▶ Fetch ══▶ Found, bytes into place, Sealed ──▶ idle again

Memory model: a block is received straight into the caller's memory, by the caller's thread: nothing is written there
once `fetch` has returned.
Threading: any thread; every wait has a limit.
"""

from __future__ import annotations

import threading
import time

import msgspec

from core.errors import ProtocolError, TransferError
from kvcache import peer_words as words
from kvcache.keys import BlockKey
from kvcache.tier import seal_of
from transport.stream import Stream

MAX_IDLE = 16


class Arrived(msgspec.Struct, frozen=True):
    """A block that has come. is_sound: it is what its holder sealed."""

    digest: int
    is_sound: bool


class PeerStreams:
    """Streams to the holder's `port` on `host`, which join with `token`."""

    def __init__(self, host: str, port: int, token: str) -> None:
        self._host = host
        self._port = port
        self._token = token
        self._lock = threading.Lock()
        self._idle: list[Stream] = []
        self._is_closed = False

    def fetch(self, key: BlockKey, into: memoryview, timeout_s: float) -> Arrived | None:
        """Fills `into`; None if the holder does not have the block. Raises TransferError if nothing, or nothing whole,
        came in time."""
        until_s = time.monotonic() + timeout_s
        while True:
            idle = self._take()
            stream = idle or self._connect(until_s)
            try:
                is_there = _is_there(stream, key, len(into), until_s)
            except TransferError:
                stream.close()
                if idle is None:
                    raise
                continue  # the holder hangs up on streams that were idle for long
            try:
                arrived = _receive(stream, key, into, until_s) if is_there else None
            except TransferError:
                stream.close()
                raise
            self._give(stream)
            return arrived

    def close(self) -> None:
        """Streams in use are closed when their fetch has ended."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for stream in idle:
            stream.close()

    def _connect(self, until_s: float) -> Stream:
        stream = Stream.connect(self._host, self._port, _remaining_s(until_s))
        try:
            stream.send(words.encode(words.Join(self._token)), _remaining_s(until_s))
        except TransferError:
            stream.close()
            raise
        return stream

    def _take(self) -> Stream | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _give(self, stream: Stream) -> None:
        with self._lock:
            is_kept = not self._is_closed and len(self._idle) < MAX_IDLE
            if is_kept:
                self._idle.append(stream)
        if not is_kept:
            stream.close()


def _is_there(stream: Stream, key: BlockKey, num_bytes: int, until_s: float) -> bool:
    """Whether the block follows. Raises TransferError."""
    stream.send(words.encode(words.Fetch(key, num_bytes)), _remaining_s(until_s))
    answer = _answer(stream, until_s)
    if isinstance(answer, words.Sealed):
        raise TransferError("a block that ends before it has begun")
    return isinstance(answer, words.Found)


def _receive(stream: Stream, key: BlockKey, into: memoryview, until_s: float) -> Arrived:
    """Raises TransferError."""
    body = stream.receive_block(into, _remaining_s(until_s))
    sealed = _answer(stream, until_s)
    if not isinstance(sealed, words.Sealed):
        raise TransferError("a block without its seal")
    return Arrived(sealed.digest, seal_of(key, sealed.digest, len(into), body) == sealed.seal)


def _answer(stream: Stream, until_s: float) -> words.Answered:
    try:
        return words.decode_answered(stream.receive(_remaining_s(until_s)))
    except ProtocolError as error:
        raise TransferError(str(error)) from error


def _remaining_s(until_s: float) -> float:
    """Raises TransferError if nothing is left."""
    remaining_s = until_s - time.monotonic()
    if remaining_s <= 0:
        raise TransferError("no block in time")
    return remaining_s
