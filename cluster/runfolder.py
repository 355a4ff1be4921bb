"""A folder per run for sockets, logs and locks, short enough for socket paths: /tmp/baton-UID/XXXXXX.

A lock that the kernel drops with its process tells the living from the dead; whatever a killed run left behind is
removed when the next one starts.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from core.errors import ConfigError

_LOCK = "lock"
_SHARED = Path("/dev/shm")
_LONGEST_BASE = 40


class RunFolder:
    """One run's folder, locked as long as this object is open."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls, base: Path | None = None) -> RunFolder:
        """Removes what dead runs left, then makes a new folder."""
        base = base or default_base()
        _make_private(base)
        remove_stale(base)
        path = Path(tempfile.mkdtemp(prefix="", dir=base))
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        return cls(path, lock)

    def subfolder(self, name: str) -> Path:
        path = self.path / name
        path.mkdir(exist_ok=True)
        return path

    def remove(self) -> None:
        """Removes the folder with everything in it."""
        _remove(self.path)
        os.close(self._lock)


def default_base() -> Path:
    """One folder per user, in the system's temporary folder unless that path is too long for sockets."""
    parent = Path(tempfile.gettempdir())
    if len(str(parent)) > _LONGEST_BASE:
        parent = Path("/tmp")
    return parent / f"baton-{os.getuid()}"


def remove_stale(base: Path) -> list[Path]:
    """Removes the folders whose run is dead; returns them."""
    removed = []
    for path in base.iterdir():
        with suppress(OSError):
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
                removed.append(path)
            finally:
                os.close(lock)
    return removed


def _remove(path: Path) -> None:
    """Also the shared memory of vLLM's tensor-parallel ranks, which killed ones leave behind: it bears the name of the
    file by which they found each other."""
    for store in path.glob("*/vllm_dist_*"):
        for segment in _SHARED.glob(f"{store.name}-*"):
            segment.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _make_private(base: Path) -> None:
    """Raises ConfigError if the folder belongs to somebody else, who could then read and replace our sockets."""
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = base.lstat()
    if status.st_uid != os.getuid() or not os.path.isdir(base) or base.is_symlink():
        raise ConfigError(f"{base} is not a folder of this user; remove it or set TMPDIR")
    base.chmod(0o700)
