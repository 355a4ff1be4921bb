"""What the disk tier remembers of its files: which blocks are whole, in order of use, and how much room is taken.

Threading: any thread; one lock, held for a few lines at a time and never during I/O.
"""

from __future__ import annotations

import enum
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from kvcache.keys import BlockKey
from kvcache.tier import TierFigures


@dataclass(slots=True, eq=False)
class FileEntry:
    """One block's file. num_bytes: of the whole file. stamped_s: the file's time, by the clock's `unix_s`."""

    key: BlockKey
    num_bytes: int
    stamped_s: float


class Fate(enum.Enum):
    """Why a block's file was removed."""

    EVICTED = "evicted"
    CORRUPT = "corrupt"
    FORGOTTEN = "forgotten"


class FileIndex:
    """What is remembered of the files: whole ones in order of use, busy keys, and the room that is taken.

    Room is claimed before a file is begun and given back after it was removed, so the files' sum stays below the
    capacity at every moment. Holds its lock for a few lines at a time.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[BlockKey, FileEntry] = OrderedDict()
        self._busy: set[BlockKey] = set()
        self._num_bytes = 0
        self._fates: Counter[Fate] = Counter()
        self._closed = False

    def add_found(self, entry: FileEntry) -> None:
        """A file from before the start; the one that was used last comes last."""
        with self._lock:
            self._entries[entry.key] = entry
            self._num_bytes += entry.num_bytes

    def prefix(self, keys: Sequence[BlockKey]) -> int:
        with self._lock:
            if not self._closed:
                for count, key in enumerate(keys):
                    if key not in self._entries:
                        return count
                return len(keys)
        return 0

    def use(self, key: BlockKey) -> FileEntry | None:
        """The entry of a whole block, which is from now on the last to be evicted."""
        with self._lock:
            entry = None if self._closed else self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
            return entry

    def begin(self, key: BlockKey) -> bool:
        """Makes a key busy that is to be written, until `end`. False if it is there or busy already."""
        with self._lock:
            if self._closed or key in self._busy or key in self._entries:
                return False
            self._busy.add(key)
            return True

    def claim(self, num_bytes: int) -> bool:
        """Takes room for a file if there is enough, until `give` or `gone`."""
        with self._lock:
            fits = self._num_bytes + num_bytes <= self.capacity_bytes
            self._num_bytes += num_bytes if fits else 0
            return fits

    def give(self, num_bytes: int) -> None:
        with self._lock:
            self._num_bytes -= num_bytes

    def end(self, key: BlockKey, written: FileEntry | None) -> None:
        """Of `begin`; `written` is found from now on."""
        with self._lock:
            self._busy.discard(key)
            if written is not None:
                self._entries[key] = written

    def take_oldest(self) -> FileEntry | None:
        """The least recently used block: no longer found, and busy until its file is `gone` or `stays`."""
        with self._lock:
            if self._closed or not self._entries:
                return None
            key, entry = self._entries.popitem(last=False)
            self._busy.add(key)
            return entry

    def take(self, entry: FileEntry) -> bool:
        """The same for a given block. False if it is not there (any more): another may stand under its key."""
        with self._lock:
            if self._closed or self._entries.get(entry.key) is not entry:
                return False
            del self._entries[entry.key]
            self._busy.add(entry.key)
            return True

    def gone(self, entry: FileEntry, fate: Fate) -> None:
        """The file of a block that was taken is removed."""
        with self._lock:
            self._busy.discard(entry.key)
            self._num_bytes -= entry.num_bytes
            self._fates[fate] += 1

    def stays(self, entry: FileEntry) -> None:
        """The file of a block that was taken cannot be removed: it keeps its room and is the next to try."""
        with self._lock:
            self._busy.discard(entry.key)
            self._entries[entry.key] = entry
            self._entries.move_to_end(entry.key, last=False)

    def close(self) -> None:
        """From now on nothing is found, begun or taken."""
        with self._lock:
            self._closed = True

    def is_drained(self) -> bool:
        """Closed, and no file is being written or removed."""
        with self._lock:
            return self._closed and not self._busy

    def figures(self) -> TierFigures:
        with self._lock:
            evicted, corrupt = self._fates[Fate.EVICTED], self._fates[Fate.CORRUPT]
            return TierFigures(len(self._entries), self._num_bytes, evicted, corrupt)
