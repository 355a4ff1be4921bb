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

import enum
import errno
import fcntl
import os
import struct
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from core.clock import Clock
from core.errors import ConfigError
from kvcache.keys import KEY_BYTES, BlockKey
from kvcache.tier import TierError, TierFigures, seal

STAMP_S = 60.0
"""A block that is in use has its file's time renewed this often: the order of use survives a restart, at the cost of
one more call per block and minute."""

_MAGIC = b"BtnBlk"
_FORMAT = 1
"""History. 1: what `_HEADER` says, then the payload."""

_HEADER = struct.Struct(f"<6sH{KEY_BYTES}sQQQ")
HEADER_BYTES = _HEADER.size
_PART = ".part"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_SHARE = 2
"""On a disk that others have filled, a block gives way to so many times its size: a file takes more than its bytes."""


@dataclass(slots=True, eq=False)
class _Entry:
    """One block's file. num_bytes: of the whole file. stamped_s: the file's time, by the clock's `unix_s`."""

    key: BlockKey
    num_bytes: int
    stamped_s: float


class _Fate(enum.Enum):
    """Why a block's file was removed."""

    EVICTED = "evicted"
    CORRUPT = "corrupt"
    FORGOTTEN = "forgotten"


class _Index:
    """What is remembered of the files: whole ones in order of use, busy keys, and the room that is taken.

    Room is claimed before a file is begun and given back after it was removed, so the files' sum stays below the
    capacity at every moment. Holds its lock for a few lines at a time.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[BlockKey, _Entry] = OrderedDict()
        self._busy: set[BlockKey] = set()
        self._num_bytes = 0
        self._fates: Counter[_Fate] = Counter()
        self._closed = False

    def add_found(self, entry: _Entry) -> None:
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

    def use(self, key: BlockKey) -> _Entry | None:
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

    def end(self, key: BlockKey, written: _Entry | None) -> None:
        """Of `begin`; `written` is found from now on."""
        with self._lock:
            self._busy.discard(key)
            if written is not None:
                self._entries[key] = written

    def take_oldest(self) -> _Entry | None:
        """The least recently used block: no longer found, and busy until its file is `gone` or `stays`."""
        with self._lock:
            if self._closed or not self._entries:
                return None
            key, entry = self._entries.popitem(last=False)
            self._busy.add(key)
            return entry

    def take(self, entry: _Entry) -> bool:
        """The same for a given block. False if it is not there (any more): another may stand under its key."""
        with self._lock:
            if self._closed or self._entries.get(entry.key) is not entry:
                return False
            del self._entries[entry.key]
            self._busy.add(entry.key)
            return True

    def gone(self, entry: _Entry, fate: _Fate) -> None:
        """The file of a block that was taken is removed."""
        with self._lock:
            self._busy.discard(entry.key)
            self._num_bytes -= entry.num_bytes
            self._fates[fate] += 1

    def stays(self, entry: _Entry) -> None:
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
            evicted, corrupt = self._fates[_Fate.EVICTED], self._fates[_Fate.CORRUPT]
            return TierFigures(len(self._entries), self._num_bytes, evicted, corrupt)


class _Folder:
    """The files, and the lock that keeps other processes away. Raises OSError as it comes."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError if another user can read the folder, or another process has it."""
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
        if status.st_uid != os.getuid():
            raise ConfigError(f"{path} belongs to user {status.st_uid}, who could read the blocks; name another folder")
        if status.st_mode & 0o077:
            raise ConfigError(f"{path} is open to other users; make it private (chmod 700) or name another folder")
        if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            raise ConfigError(f"{path} cannot be written; change its mode, its mount, or name another folder")
        self._path = str(path)
        flags = os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._lock = os.fdopen(os.open(path / "lock", flags, 0o600), "rb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            if error.errno != errno.EWOULDBLOCK:
                raise
            raise ConfigError(f"{path} is in use by another process; stop it or name another folder") from None

    def unlock(self) -> None:
        """May be called again. Also ends the hold of a child that was forked and has not yet become another program."""
        with suppress(ValueError):
            fcntl.flock(self._lock, fcntl.LOCK_UN)
        self._lock.close()

    def scan(self) -> list[_Entry]:
        """Removes unfinished files and returns the others, the one that was used last at the end. Files that have no
        name of ours are left alone."""
        found = []
        for number in range(256):
            subfolder = f"{number:02x}"
            with suppress(FileNotFoundError), os.scandir(f"{self._path}/{subfolder}") as items:
                for item in items:
                    key = _key_of(item.name.removesuffix(_PART))
                    if key is None or key[0] != number or not item.is_file(follow_symlinks=False):
                        continue
                    if item.name.endswith(_PART):
                        os.unlink(item.path)
                    else:
                        status = item.stat(follow_symlinks=False)
                        found.append(_Entry(key, status.st_size, status.st_mtime))
        return sorted(found, key=lambda entry: entry.stamped_s)

    def read(self, key: BlockKey, into: memoryview) -> int | None:
        """The digest; None if the file is not what was put, or has another size. FileNotFoundError if there is none."""
        descriptor = os.open(self._file(key), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if os.fstat(descriptor).st_size != HEADER_BYTES + len(into):
                return None
            header = memoryview(bytearray(HEADER_BYTES))
            at = 0
            while at < HEADER_BYTES + len(into):
                num_read = os.preadv(descriptor, [header[at:], into[max(at - HEADER_BYTES, 0) :]], at)
                if num_read == 0:
                    return None
                at += num_read
        finally:
            os.close(descriptor)
        digest: int = _HEADER.unpack(header)[3]
        return digest if header == _header(key, digest, into) else None

    def write(self, entry: _Entry, digest: int, block: memoryview) -> None:
        """The whole block under its name, or nothing. One writer per key at a time."""
        header = memoryview(_header(entry.key, digest, block))
        part = self._file(entry.key) + _PART
        try:
            descriptor = self._create(part)
            try:
                at = 0
                while at < entry.num_bytes:
                    at += os.writev(descriptor, [header[at:], block[max(at - HEADER_BYTES, 0) :]])
                os.utime(descriptor, ns=_nanoseconds(entry.stamped_s))
            finally:
                os.close(descriptor)
            os.rename(part, self._file(entry.key))
        except OSError:
            # What cannot be removed now either is overwritten by the key's next put, or removed at the next start.
            with suppress(OSError):
                os.unlink(part)
            raise

    def stamp(self, entry: _Entry) -> None:
        """Renews the file's time; one that refuses loses its place after a restart and nothing else."""
        with suppress(OSError):
            os.utime(self._file(entry.key), ns=_nanoseconds(entry.stamped_s))

    def remove(self, key: BlockKey) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self._file(key))

    def _create(self, part: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(part, flags, 0o600)
        except FileNotFoundError:
            with suppress(FileExistsError):
                os.mkdir(os.path.dirname(part), 0o700)
            return os.open(part, flags, 0o600)

    def _file(self, key: BlockKey) -> str:
        name = key.hex()
        return f"{self._path}/{name[:2]}/{name}"


class DiskTier:
    """A tier in `folder`, whose files together are never larger than `capacity_bytes`, headers included.

    Finds the blocks of an earlier run and removes what is too much. A block larger than the capacity is not kept, nor
    one whose key is being written or removed at that moment. The folder is made if it is missing; of an existing one,
    only files with names of ours are touched. `clock` stamps files in Unix seconds.
    Raises ConfigError if the folder belongs to another user, is open to others, cannot be written or is in use.
    """

    name = "disk"

    def __init__(self, folder: Path, capacity_bytes: int, clock: Clock) -> None:
        self._index = _Index(capacity_bytes)
        self._clock = clock
        self._path = folder
        try:
            self._folder = _Folder(folder)
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
                self._forget(entry, _Fate.FORGOTTEN)
                return None
            except OSError as error:
                if error.errno == errno.EIO:
                    self._forget(entry, _Fate.CORRUPT)
                raise
            if digest is None:
                self._forget(entry, _Fate.CORRUPT)
            else:
                self._stamp(entry)
            return digest

    def put(self, key: BlockKey, digest: int, block: memoryview) -> None:
        """Writes a block (contiguous bytes) with the arena's digest of it, evicting others for it.

        Raises TierError if the disk is full and nothing of ours is left to evict, is read-only, or fails.
        """
        there = self._index.use(key)
        if there is not None:
            self._stamp(there)
            return
        entry = _Entry(key, HEADER_BYTES + len(block), self._clock.unix_s())
        if entry.num_bytes > self._index.capacity_bytes or not self._index.begin(key):
            return
        written = None
        try:
            with self._trouble_named("written to"):
                if self._make_room(entry.num_bytes) and self._write(entry, digest, block):
                    written = entry
        finally:
            self._index.end(key, written)
            self._unlock_if_drained()

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """Removes blocks; unknown ones are passed over. Raises TierError if a file cannot be removed."""
        with self._trouble_named("written to"):
            for key in keys:
                entry = self._index.use(key)
                if entry is not None:
                    self._forget(entry, _Fate.FORGOTTEN)

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

    def _evict_one(self) -> _Entry | None:
        """The block that went; None if there is none."""
        entry = self._index.take_oldest()
        if entry is not None:
            self._remove(entry, _Fate.EVICTED)
        return entry

    def _forget(self, entry: _Entry, fate: _Fate) -> None:
        if self._index.take(entry):
            self._remove(entry, fate)

    def _remove(self, entry: _Entry, fate: _Fate) -> None:
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

    def _write(self, entry: _Entry, digest: int, block: memoryview) -> bool:
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

    def _stamp(self, entry: _Entry) -> None:
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


def _header(key: BlockKey, digest: int, block: memoryview) -> bytes:
    return _HEADER.pack(_MAGIC, _FORMAT, key, digest, len(block), seal(key, digest, block))


def _key_of(name: str) -> BlockKey | None:
    """The key that a file is named after; None if it is none of ours."""
    with suppress(ValueError):
        key = bytes.fromhex(name)
        if len(key) == KEY_BYTES and key.hex() == name:
            return key
    return None


def _nanoseconds(seconds: float) -> tuple[int, int]:
    return int(seconds * 1e9), int(seconds * 1e9)
