"""What a restarted server must know: one fixed record per block that is complete, in shared memory of its own.

    header: magic, version, arena's id ┃ record 0 ┃ record 1 ┃ ...      record: key, offset, bytes, digest, checksum

Memory model: a memfd that only the server maps; whoever started the server holds its descriptor, so it outlives a
`kill -9`. A record is written after its block was committed and cleared before its bytes can be given to another; one
that is torn fails its checksum and is passed over.
Threading: the server's thread only.
"""

from __future__ import annotations

import ctypes
import secrets
import struct
from collections.abc import Iterator
from typing import NamedTuple

import xxhash

from core.errors import ConfigError
from kvcache.keys import KEY_BYTES, BlockKey
from transport.mapping import Mapping

_HEADER = struct.Struct("<8s16s")
_RECORD = struct.Struct(f"<{KEY_BYTES}sQQQ")
_SUM = struct.Struct("<Q")
_MAGIC = b"baton\x00\x00\x01"
RECORD_BYTES = 64
BLOCK_BYTES_PER_RECORD = 64 << 10
"""One record for so many bytes of arena: blocks are rarely smaller."""


class Line(NamedTuple):
    """One complete block."""

    key: BlockKey
    offset: int
    num_bytes: int
    digest: int


def ledger_bytes(arena_bytes: int) -> int:
    """How large the ledger of an arena is."""
    return RECORD_BYTES * (1 + max(arena_bytes // BLOCK_BYTES_PER_RECORD, 64))


class Ledger:
    """Opens the ledger in `memory`; writes a header where there is none yet."""

    def __init__(self, memory: Mapping) -> None:
        self._memory = memory
        self._view = memoryview((ctypes.c_char * memory.num_bytes).from_address(memory.address)).cast("B")
        magic, arena = _HEADER.unpack_from(self._view)
        if magic == bytes(len(_MAGIC)):
            arena = secrets.token_bytes(16)
            _HEADER.pack_into(self._view, 0, _MAGIC, arena)
        elif magic != _MAGIC:
            raise ConfigError("the cache's ledger was written by another version of Baton; start with a new arena")
        self.arena_id = arena.hex()
        self._num_records = memory.num_bytes // RECORD_BYTES - 1
        self._free = list(range(self._num_records, 0, -1))
        self._places: dict[BlockKey, int] = {}

    def lines(self) -> Iterator[Line]:
        """Every sound record, oldest place first. To be read once, before anything is written."""
        for place in range(1, self._num_records + 1):
            line = self._read(place)
            if line is not None and line.key not in self._places:
                self._places[line.key] = place
                yield line
        used = set(self._places.values())
        self._free = [place for place in range(self._num_records, 0, -1) if place not in used]

    def write(self, line: Line) -> bool:
        """False if the ledger is full: the block is then lost with this server."""
        if not self._free:
            return False
        place = self._places[line.key] = self._free.pop()
        record = _RECORD.pack(*line)
        at = place * RECORD_BYTES
        self._view[at : at + RECORD_BYTES] = (record + _checksum(record)).ljust(RECORD_BYTES, b"\0")
        return True

    def clear(self, key: BlockKey) -> None:
        """The block's bytes may go to another from now on."""
        place = self._places.pop(key, None)
        if place is not None:
            at = place * RECORD_BYTES
            self._view[at : at + RECORD_BYTES] = bytes(RECORD_BYTES)
            self._free.append(place)

    def _read(self, place: int) -> Line | None:
        at = place * RECORD_BYTES
        record = bytes(self._view[at : at + _RECORD.size])
        checksum = bytes(self._view[at + _RECORD.size : at + _RECORD.size + _SUM.size])
        return Line(*_RECORD.unpack(record)) if any(record) and checksum == _checksum(record) else None


def _checksum(record: bytes) -> bytes:
    return _SUM.pack(xxhash.xxh3_64_intdigest(record, seed=1))
