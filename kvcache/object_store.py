"""A place in an object store, or in whatever else fsspec reaches: objects by key, read, written whole, removed.

    s3://bucket/prefix, file:///mnt/nfs/kv, memory://kv ──▶ PREFIX/5e/5e09…c4

An object appears whole: stores of objects promise that, and elsewhere (file://) a file is written under another name
and renamed. A writer that is killed there leaves a file that ends in .part behind, which `remove_all` removes too.

Memory model: whole values, in memory of ours.
Threading: any thread; `remove_all` has threads of its own. fsspec's clients have a thread of their own per process.
"""

from __future__ import annotations

import errno
import importlib
import re
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol, TypeVar, cast

from core.errors import ConfigError
from kvcache.keys import BlockKey
from kvcache.tier import TierError

TIMEOUT_S = 5.0
"""Of S3, for connecting and for each silence."""

_WHOLE = ("memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "obs")
"""Protocols whose objects appear whole by themselves."""

_REMOVALS = 8
_OURS = re.compile(r"/([0-9a-f]{2})/\1[0-9a-f]{30}(\.[0-9a-f]{16}\.part)?$")

T = TypeVar("T")


class FileSystem(Protocol):
    """What is used of fsspec's file systems."""

    def cat_file(self, path: str, *, start: int | None = None, end: int | None = None) -> bytes: ...

    def pipe_file(self, path: str, value: bytes) -> object: ...

    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...

    def mv(self, path1: str, path2: str) -> object: ...

    def rm_file(self, path: str) -> object: ...

    def find(self, path: str) -> list[str]: ...


class ObjectStore:
    """Objects under `url`. Raises ConfigError if it names no store, or one whose library is not installed; that a store
    can be reached is found out when it is used."""

    def __init__(self, url: str) -> None:
        self.name = url.rpartition("@")[2]  # whatever stands before it may be a password
        self.files, self._root = _open(url)
        self._is_whole = url.partition("://")[0] in _WHOLE
        self._is_closed = False

    def read(self, key: BlockKey, most_bytes: int) -> bytes | None:
        """The beginning of an object; None if there is none. Raises TierError."""
        try:
            return self._ask("read from", lambda: self._beginning(self.path(key), most_bytes))
        except FileNotFoundError:
            return None

    def write(self, key: BlockKey, value: bytes) -> None:
        """The whole object, or nothing. Raises TierError."""
        self._ask("written to", lambda: self._write(self.path(key), value))

    def remove(self, key: BlockKey) -> None:
        """Also if it is not there. Raises TierError."""
        self._remove_path(self.path(key))

    def remove_all(self) -> None:
        """Every object whose name is one of ours, whoever wrote it. Raises TierError."""
        paths = []
        with suppress(FileNotFoundError):
            paths = self._ask("listed", lambda: self.files.find(self._root))
        with ThreadPoolExecutor(_REMOVALS, thread_name_prefix="baton-cache-remove") as threads:
            list(threads.map(self._remove_path, [path for path in paths if _OURS.search(path)]))

    def path(self, key: BlockKey) -> str:
        """Where a key's object lies, as the store's file system has it."""
        name = key.hex()
        return f"{self._root}/{name[:2]}/{name}"

    def close(self) -> None:
        """Every later call raises TierError."""
        self._is_closed = True

    def check_open(self) -> None:
        """Raises TierError once it is closed."""
        if self._is_closed:
            raise TierError(f"the lines to {self.name} are closed")

    def _remove_path(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._ask("written to", lambda: self.files.rm_file(path))

    def _beginning(self, path: str, most_bytes: int) -> bytes:
        try:
            return self.files.cat_file(path, start=0, end=most_bytes)
        except OSError as error:
            if error.errno == errno.EINVAL and "range" in str(error):
                return b""  # S3 has no range of an empty object
            raise

    def _write(self, path: str, value: bytes) -> None:
        if self._is_whole:
            self.files.pipe_file(path, value)
            return
        part = f"{path}.{secrets.token_hex(8)}.part"
        self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
        try:
            self.files.pipe_file(part, value)
            self.files.mv(part, path)
        except Exception:
            with suppress(Exception):
                self.files.rm_file(part)
            raise

    def _ask(self, doing: str, call: Callable[[], T]) -> T:
        """Raises TierError, or FileNotFoundError if what is asked for is not there."""
        self.check_open()
        try:
            return call()
        except FileNotFoundError:
            raise
        except Exception as error:  # the libraries of the stores raise what they like
            raise TierError(f"{self.name} cannot be {doing}: {type(error).__name__}: {error}") from error


def _open(url: str) -> tuple[FileSystem, str]:
    """The store and the path in it. Raises ConfigError."""
    protocol, _, rest = url.partition("://")
    if not rest.strip("/"):
        raise ConfigError(f"--cache: {url!r} names no place in a store; write it like s3://bucket/prefix")
    options: dict[str, Any] = {"skip_instance_cache": True}
    if protocol in ("s3", "s3a"):
        times = {"connect_timeout": TIMEOUT_S, "read_timeout": TIMEOUT_S, "retries": {"max_attempts": 1}}
        options |= {"config_kwargs": times, "use_listings_cache": False}
    try:
        store, root = importlib.import_module("fsspec.core").url_to_fs(url, **options)
    except ImportError as error:
        raise ConfigError(f"--cache {protocol}://: {error}; pip install 'baton-serve[object]'") from error
    except Exception as error:  # the libraries of the stores raise what they like
        raise ConfigError(f"--cache {protocol}://: {type(error).__name__}: {error}") from error
    if protocol in ("s3", "s3a"):
        store.retries = 1  # the server has a breaker of its own, and computing goes on meanwhile
    return cast(FileSystem, store), str(root).rstrip("/")
