"""The disk tier's files: a block each, written under another name first, read straight into place.

Memory model: nothing of a block is copied on its way between the caller's memory and the file.
Threading: any thread; one writer per key at a time is the caller's to see to. Raises OSError as it comes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from contextlib import suppress
from pathlib import Path

from core.errors import ConfigError
from kvcache.disk_index import FileEntry
from kvcache.keys import KEY_BYTES, BlockKey
from kvcache.tier import seal

_MAGIC = b"BtnBlk"
_FORMAT = 1
"""History. 1: what `_HEADER` says, then the payload."""

_HEADER = struct.Struct(f"<6sH{KEY_BYTES}sQQQ")
HEADER_BYTES = _HEADER.size
_PART = ".part"


class BlockFolder:
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

    def scan(self) -> list[FileEntry]:
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
                        found.append(FileEntry(key, status.st_size, status.st_mtime))
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

    def read_whole(self, key: BlockKey, most_bytes: int) -> tuple[int, memoryview] | None:
        """Digest and payload, whatever its size up to most_bytes; otherwise as `read`."""
        num_bytes = os.stat(self._file(key), follow_symlinks=False).st_size - HEADER_BYTES
        if not 0 <= num_bytes <= most_bytes:
            return None
        block = memoryview(bytearray(num_bytes))
        digest = self.read(key, block)
        return None if digest is None else (digest, block)

    def write(self, entry: FileEntry, digest: int, block: memoryview) -> None:
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

    def stamp(self, entry: FileEntry) -> None:
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
