"""What a restarted server must know of labels, in the memory that its starter holds, behind the ledger.

    half 0: magic, number, length, checksum, labels ┃ half 1: the same       written in turn, the head last

The half with the higher number that is sound counts; one that was being written when the server was killed is not
sound, and the other is at most a moment older.

Memory model: twice `half_bytes`, of which only what was ever written takes memory.
Threading: the server's event loop. One write takes about a millisecond per 20,000 keys.
"""

from __future__ import annotations

import ctypes
import struct

import msgspec
import xxhash

from transport.mapping import Mapping

_HEAD = struct.Struct("<8sQQQ")
_MAGIC = b"btnlbl\x00\x01"
SMALLEST_HALF_BYTES = 64 << 10
LARGEST_HALF_BYTES = 64 << 20
_ARENA_BYTES_PER_BYTE = 256


class LabelNote(msgspec.Struct, frozen=True, array_like=True):
    """One label. Times are of CLOCK_MONOTONIC, which goes on when a server ends; deadline_s 0: none."""

    name: str
    tenant: bytes
    keys: bytes
    block_bytes: int
    num_tokens: int
    ttl_s: float
    created_s: float
    deadline_s: float
    is_pinned: bool


def half_bytes(arena_bytes: int) -> int:
    """How much memory labels have, twice."""
    return min(max(arena_bytes // _ARENA_BYTES_PER_BYTE, SMALLEST_HALF_BYTES), LARGEST_HALF_BYTES)


class LabelNotes:
    """The notes in `memory` from `start` on; `half_bytes` as the function says."""

    def __init__(self, memory: Mapping, start: int, half_bytes: int) -> None:
        self._memory = memory
        self._view = memoryview((ctypes.c_char * memory.num_bytes).from_address(memory.address)).cast("B")
        self._starts = (start, start + half_bytes)
        self._half_bytes = half_bytes
        self._number = 0

    def read(self) -> list[LabelNote]:
        """The newest sound notes; none where nothing was ever written."""
        newest: list[LabelNote] = []
        for at in self._starts:
            magic, number, length, checksum = _HEAD.unpack_from(self._view, at)
            body = self._view[at + _HEAD.size : at + self._half_bytes][:length]
            if magic != _MAGIC or number <= self._number or checksum != _checksum(number, body):
                continue
            try:
                newest = msgspec.msgpack.decode(body, type=list[LabelNote])
            except msgspec.DecodeError:
                continue
            self._number = number
        return newest

    def write(self, notes: list[LabelNote]) -> bool:
        """Replaces what was noted. False if there is no room for all of them: then none is noted."""
        body = msgspec.msgpack.encode(notes)
        fits = _HEAD.size + len(body) <= self._half_bytes
        if not fits:
            body = msgspec.msgpack.encode([])
        self._number += 1
        at = self._starts[self._number % 2]
        self._view[at : at + _HEAD.size] = bytes(_HEAD.size)
        self._view[at + _HEAD.size : at + _HEAD.size + len(body)] = body
        _HEAD.pack_into(self._view, at, _MAGIC, self._number, len(body), _checksum(self._number, body))
        return fits


def _checksum(number: int, body: bytes | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(body, seed=number)
