"""Blocks on a local disk: a file each, found again after a restart, the least recently used removed for the next.

    FOLDER/lock                held by the one process that uses the folder
    FOLDER/5e/5e09…c4          header (magic, format, key, digest, payload's length, seal) ┃ payload
    FOLDER/5e/5e09…c4.part     being written; renamed when it is whole, removed at start if its writer was killed

A file is never written to after it got its name, so a reader sees a whole block or none. Nothing is forced to the disk
(no fsync): after a power cut a file may be torn or empty, then its seal does not fit and it is a miss, which costs a
block and never a wrong byte.

Memory model: a file is read straight into the caller's memory and written straight from it, nothing is copied. What is
remembered of a block (key, size, when its file was last stamped) takes about 300 bytes.
Threading: any thread at any time. One lock around what is remembered, never held during I/O; a key whose file is being
written or removed is busy, and nobody else touches a busy key.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from core.clock import Clock
from core.errors import ConfigError
from kvcache.disk_folder import HEADER_BYTES, BlockFolder
from kvcache.disk_index import Fate, FileEntry, FileIndex
from kvcache.keys import BlockKey
from kvcache.tier import TierError, TierFigures

STAMP_S = 60.0
"""A block that is in use has its file's time renewed this often: the order of use survives a restart, at the cost of
one more call per block and minute."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_SHARE = 2
"""On a disk that others have filled, a block gives way to so many times its size: a file takes more than its bytes."""


class DiskTier:
    """A tier in `folder`, whose files together are never larger than `capacity_bytes`, headers included.

    Finds the blocks of an earlier run and removes what is too much. A block larger than the capacity is not kept, nor
    one whose key is being written or removed at that moment. The folder is made if it is missing; of an existing one,
    only files with names of ours are touched. `clock` stamps files in Unix seconds.
    Raises ConfigError if the folder belongs to another user, is open to others, cannot be written or is in use.
    """

    name = "disk"
    is_written = True

    def __init__(self, folder: Path, capacity_bytes: int, clock: Clock) -> None:
        self._index = FileIndex(capacity_bytes)
        self._clock = clock
        self._path = folder
        try:
            self._folder = BlockFolder(folder)
        except OSError as error:
            raise _unusable(folder, error) from error
        try:
            for entry in self._folder.scan():
                self._index.add_found(entry)
            self._make_room(0)
        except OSError as error:
            self._folder.unlock()
            raise _unusable(folder, error) from error

    def contains(self, keys: Sequence[BlockKey]) -> int:
        """How many of the first keys are remembered, without a gap; their files are not looked at."""
        return self._index.prefix(keys)

    def get(self, key: BlockKey, into: memoryview) -> int | None:
        """Reads a block into `into` (contiguous bytes, writable) and returns its digest, or None.

        A file that is torn, altered or of another size is removed. Raises TierError if the disk cannot be read; a block
        that it cannot read for good (EIO) is forgotten.
        """
        entry = self._index.use(key)
        if entry is None:
            return None
        with self._trouble_named("read from"):
            try:
                digest = self._folder.read(key, into)
            except FileNotFoundError:  # evicted meanwhile, or removed by somebody else
                self._forget(entry, Fate.FORGOTTEN)
                return None
            except OSError as error:
                if error.errno == errno.EIO:
                    self._forget(entry, Fate.CORRUPT)
                raise
            if digest is None:
                self._forget(entry, Fate.CORRUPT)
            else:
                self._stamp(entry)
            return digest

    def put(self, key: BlockKey, digest: int, block: memoryview) -> bool:
        """Writes a block (contiguous bytes) with the arena's digest of it, evicting others for it. False if it is
        larger than the capacity, its key is busy, or all room is taken by writes under way.

        Raises TierError if the disk is full and nothing of ours is left to evict, is read-only, or fails.
        """
        there = self._index.use(key)
        if there is not None:
            self._stamp(there)
            return True
        entry = FileEntry(key, HEADER_BYTES + len(block), self._clock.unix_s())
        if entry.num_bytes > self._index.capacity_bytes or not self._index.begin(key):
            return False
        written = None
        try:
            with self._trouble_named("written to"):
                if self._make_room(entry.num_bytes) and self._write(entry, digest, block):
                    written = entry
        finally:
            self._index.end(key, written)
            self._unlock_if_drained()
        return written is not None

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """Removes blocks; unknown ones are passed over. Raises TierError if a file cannot be removed."""
        with self._trouble_named("written to"):
            for key in keys:
                entry = self._index.use(key)
                if entry is not None:
                    self._forget(entry, Fate.FORGOTTEN)

    def figures(self) -> TierFigures:
        """num_bytes: of all files, headers and those that are being written included."""
        return self._index.figures()

    def close(self) -> None:
        """From now on every get is a miss and every put is not kept; the files stay. The folder is free for another
        process once the calls that are under way have ended. May be called again."""
        self._index.close()
        self._unlock_if_drained()

    def _make_room(self, num_bytes: int) -> bool:
        """Claims room. False if all of it is taken by blocks that are being written."""
        while not self._index.claim(num_bytes):
            if self._evict_one() is None:
                return False
        return True

    def _evict_one(self) -> FileEntry | None:
        """The block that went; None if there is none."""
        entry = self._index.take_oldest()
        if entry is not None:
            self._remove(entry, Fate.EVICTED)
        return entry

    def _forget(self, entry: FileEntry, fate: Fate) -> None:
        if self._index.take(entry):
            self._remove(entry, fate)

    def _remove(self, entry: FileEntry, fate: Fate) -> None:
        """A block that was taken."""
        removed = False
        try:
            self._folder.remove(entry.key)
            removed = True
        finally:
            if removed:
                self._index.gone(entry, fate)
            else:
                self._index.stays(entry)
            self._unlock_if_drained()

    def _write(self, entry: FileEntry, digest: int, block: memoryview) -> bool:
        """Once more if the disk was full and some blocks could be evicted. Gives the room back if both fail."""
        written = False
        try:
            try:
                self._folder.write(entry, digest, block)
            except OSError as error:
                if error.errno not in _FULL or not self._evict(_FULL_SHARE * entry.num_bytes):
                    raise
                self._folder.write(entry, digest, block)
            written = True
        finally:
            if not written:
                self._index.give(entry.num_bytes)
        return written

    def _evict(self, num_bytes: int) -> int:
        """At least so many bytes, as far as there are any; returns how many it were."""
        freed = 0
        while freed < num_bytes and (entry := self._evict_one()) is not None:
            freed += entry.num_bytes
        return freed

    def _stamp(self, entry: FileEntry) -> None:
        now_s = self._clock.unix_s()
        if now_s - entry.stamped_s >= STAMP_S:
            entry.stamped_s = now_s
            self._folder.stamp(entry)

    def _unlock_if_drained(self) -> None:
        if self._index.is_drained():
            self._folder.unlock()

    @contextmanager
    def _trouble_named(self, doing: str) -> Iterator[None]:
        """Makes a TierError of what the system reports."""
        try:
            yield
        except OSError as error:
            cause = error.strerror or str(error)
            if error.errno in _FULL:
                cause = "the disk is full and there is nothing of ours left to evict; free some space on it"
            elif error.errno == errno.EROFS:
                cause = "the filesystem is read-only; see the kernel's log for what happened to it"
            elif error.errno == errno.EIO:
                cause = "the device fails (I/O error); see the kernel's log"
            raise TierError(f"the cache's folder {self._path} cannot be {doing}: {cause}") from error


def _unusable(folder: Path, error: OSError) -> ConfigError:
    cause = error.strerror or str(error)
    return ConfigError(f"the cache cannot keep blocks in {folder}: {cause}; name a folder that this user can write")
