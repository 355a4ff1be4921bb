"""Blocks in an object store, each an object with a header before its bytes. Several hosts may share a store.

    contains ──▶ Looks (what was seen, or is seen now)
    get, put ──▶ ObjectStore: | BATONOB + version | key | arena's digest u64 | length u64 | seal u64 | payload |

Nothing is listed. What is never asked for again is for the bucket's life-cycle rules to remove. Credentials and
endpoints come from the environment, as fsspec and the store's client have them.

Memory model: `put` and `get` hold a second copy of a block while it travels; `get` reads a byte more than fits at most.
Threading: any thread; a delete has up to _REMOVALS threads of its own.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from core.clock import Clock, SystemClock
from kvcache.keys import KEY_BYTES, BlockKey
from kvcache.object_looks import Looks, Sightings
from kvcache.object_store import ObjectStore
from kvcache.tier import TierError, TierFigures, seal

_MAGIC = b"BATONOB\x01"
_HEADER = struct.Struct(f"<8s{KEY_BYTES}sQQQ")
HEADER_BYTES = _HEADER.size
_REMOVALS = 8

_GREETING = b"\xff" * KEY_BYTES
"""Looked for at start: a store's first call may take a second, and no request shall wait for it."""


class ObjectTier:
    """A tier under `url`. Raises ConfigError as ObjectStore does."""

    name = "object"
    is_written = True
    lossy = ""

    def __init__(self, url: str, clock: Clock | None = None) -> None:
        clock = clock or SystemClock()
        self.store = ObjectStore(url)
        self._sightings = Sightings(clock)
        self._looks = Looks(lambda key: self._read(key, HEADER_BYTES), self._sightings, clock)
        self._lock = threading.Lock()
        self._figures = TierFigures()
        self._looks.look([_GREETING], 0.0)

    def contains(self, keys: Sequence[BlockKey]) -> int:
        """See Looks.count."""
        self.store.check_open()
        return self._looks.count(keys)

    def get(self, key: BlockKey, into: memoryview) -> int | None:
        """See Tier. An object that is not what was put is removed. Raises TierError if the store cannot be read."""
        value = self._read(key, HEADER_BYTES + len(into) + 1)
        if value is None:
            return None
        if len(value) == HEADER_BYTES + len(into):
            digest: int = _HEADER.unpack_from(value)[2]
            block = memoryview(value)[HEADER_BYTES:]
            if value.startswith(_header(key, digest, block)):
                into[:] = block
                return digest
        self._discard(key)
        return None

    def get_whole(self, key: BlockKey, most_bytes: int) -> tuple[int, memoryview] | None:
        """As `get`, of a block of any size up to most_bytes: its digest, and its bytes in memory of its own."""
        value = self._read(key, HEADER_BYTES + most_bytes + 1)
        if value is None or len(value) > HEADER_BYTES + most_bytes:
            return None
        if len(value) >= HEADER_BYTES:
            digest: int = _HEADER.unpack_from(value)[2]
            block = memoryview(value)[HEADER_BYTES:]
            if value.startswith(_header(key, digest, block)):
                return digest, block
        self._discard(key)
        return None

    def put(self, key: BlockKey, digest: int, block: memoryview) -> bool:
        """See Tier. A block that was seen there is not written again. Raises TierError if it cannot be written."""
        self.store.check_open()
        if self._sightings.knows(key):
            return True
        self.store.write(key, b"".join((_header(key, digest, block), block)))
        self._sightings.seen(key)
        with self._lock:
            self._figures = _added(self._figures, blocks=1, num_bytes=len(block))
        return True

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """Removes blocks; unknown ones are passed over. Raises TierError if the store refuses."""
        self.store.check_open()
        with ThreadPoolExecutor(_REMOVALS, thread_name_prefix="baton-cache-remove") as threads:
            list(threads.map(self._remove, keys))

    def clear(self) -> None:
        """Removes every block under the URL, those of other hosts too. Raises TierError if the store refuses."""
        self._sightings.clear()
        self.store.remove_all()
        self._sightings.clear()

    def figures(self) -> TierFigures:
        """What this object has put and found corrupt; not what the store holds, which others share."""
        with self._lock:
            return self._figures

    def close(self) -> None:
        """Every later call raises TierError. May be called again."""
        self.store.close()
        self._looks.close()

    def _read(self, key: BlockKey, most_bytes: int) -> bytes | None:
        """The beginning of an object; None if there is none. Remembers which. Raises TierError."""
        value = self.store.read(key, most_bytes)
        if value is None:
            self._sightings.missed(key)
        else:
            self._sightings.seen(key)
        return value

    def _discard(self, key: BlockKey) -> None:
        """A block that is not what was put."""
        with self._lock:
            self._figures = _added(self._figures, corrupt=1)
        with suppress(TierError):  # it stays, and is found out again
            self._remove(key)

    def _remove(self, key: BlockKey) -> None:
        self._sightings.missed(key)
        self.store.remove(key)


def _added(old: TierFigures, blocks: int = 0, num_bytes: int = 0, corrupt: int = 0) -> TierFigures:
    return TierFigures(blocks=old.blocks + blocks, num_bytes=old.num_bytes + num_bytes, corrupt=old.corrupt + corrupt)


def _header(key: BlockKey, digest: int, block: memoryview) -> bytes:
    return _HEADER.pack(_MAGIC, key, digest, len(block), seal(key, digest, block))
