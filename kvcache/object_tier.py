"""Blocks in an object store, or in whatever else fsspec reaches: s3://bucket/prefix, file:///mnt/nfs/kv, memory://kv.

    PREFIX/5e/5e09…c4 = | BATONOB + version | key | arena's digest u64 | payload's length u64 | seal u64 | payload |

An object appears whole: stores of objects promise that, and elsewhere (file://) a file is written under another name
and renamed. Several hosts may share a prefix: the same key has the same bytes. Nothing is listed. `contains` looks at
objects it does not know, several at once and more of them as long as they are there, and remembers what it saw: what
was there until a get misses, what was not for ABSENT_S. What is never asked for again is for the bucket's life-cycle
rules to remove. Credentials and endpoints come from the environment, as fsspec and the store's client have them.

Memory model: `put` and `get` hold a second copy of a block while it travels; MAX_REMEMBERED keys are remembered.
Threading: any thread; looks run in LOOKS threads. fsspec's clients have a thread of their own per process.
"""

from __future__ import annotations

import errno
import importlib
import secrets
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol, TypeVar, cast

from core.clock import Clock, SystemClock
from core.errors import ConfigError
from kvcache.keys import KEY_BYTES, BlockKey
from kvcache.tier import TierError, TierFigures, seal

_MAGIC = b"BATONOB\x01"
_HEADER = struct.Struct(f"<8s{KEY_BYTES}sQQQ")
HEADER_BYTES = _HEADER.size

LOOKS = 16
CONTAINS_S = 0.2
"""After so long `contains` says what it has found so far; less than the server waits for it."""

ABSENT_S = 5.0
MAX_REMEMBERED = 1 << 18
TIMEOUT_S = 5.0
"""Of S3, for connecting and for each silence."""

_WHOLE = ("memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "obs")
"""Protocols whose objects appear whole by themselves."""

T = TypeVar("T")


class Store(Protocol):
    """What is used of fsspec's file systems."""

    def cat_file(self, path: str, *, start: int | None = None, end: int | None = None) -> bytes: ...

    def pipe_file(self, path: str, value: bytes) -> object: ...

    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...

    def mv(self, path1: str, path2: str) -> object: ...

    def rm_file(self, path: str) -> object: ...


class ObjectTier:
    """A tier under `url`. Raises ConfigError if it names no store, or one whose library is not installed; that a store
    can be reached is found out when it is used."""

    name = "object"
    is_written = True

    def __init__(self, url: str, clock: Clock | None = None) -> None:
        protocol = url.partition("://")[0]
        self._url = url.rpartition("@")[2]  # whatever stands before it may be a password
        self._store, self._root = _open(url)
        self._is_whole = protocol in _WHOLE
        self._clock = clock or SystemClock()
        self._sightings = _Sightings(self._clock)
        self._looks = ThreadPoolExecutor(LOOKS, thread_name_prefix="baton-cache-look")
        self._lock = threading.Lock()
        self._figures = TierFigures()
        self._is_closed = False
        self._looks.submit(self._greet)

    def contains(self, keys: Sequence[BlockKey]) -> int:
        """How many of the first keys are there, without a gap, as far as could be seen in CONTAINS_S. Raises TierError
        if the store cannot be asked."""
        deadline_s = self._clock.monotonic_s() + CONTAINS_S
        at, width = 0, 1
        while True:
            while at < len(keys) and self._sightings.knows(keys[at]):
                at += 1
            if at == len(keys) or self._sightings.lacks(keys[at]) or self._clock.monotonic_s() >= deadline_s:
                return at
            self._look([key for key in keys[at : at + width] if not self._sightings.knows(key)])
            width = min(4 * width, LOOKS)

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
                self._sightings.seen(key)
                return digest
        with self._lock:
            self._figures = _added(self._figures, corrupt=1)
        with suppress(TierError):  # it stays, and is found out again
            self._remove(key)
        return None

    def put(self, key: BlockKey, digest: int, block: memoryview) -> bool:
        """See Tier. A block that was seen there is not written again. Raises TierError if it cannot be written."""
        if self._sightings.knows(key):
            return True
        value = b"".join((_header(key, digest, block), block))
        self._ask("written to", lambda: self._write(self._path(key), value))
        self._sightings.seen(key)
        with self._lock:
            self._figures = _added(self._figures, blocks=1, num_bytes=len(block))
        return True

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """Removes blocks; unknown ones are passed over. Raises TierError if the store does not let it."""
        for removing in [self._submit(self._remove, key) for key in keys]:
            removing()

    def figures(self) -> TierFigures:
        """What this object has put and found corrupt; not what the store holds, which others share."""
        with self._lock:
            return self._figures

    def close(self) -> None:
        """Every later call raises TierError. May be called again."""
        self._is_closed = True
        self._looks.shutdown(wait=False, cancel_futures=True)

    def _greet(self) -> None:
        """Looks for something: a store's first call may take a second, and no request shall wait for it."""
        with suppress(TierError):
            self._read(b"\xff" * KEY_BYTES, HEADER_BYTES)

    def _look(self, keys: Sequence[BlockKey]) -> None:
        """Remembers of each whether it is there. Raises TierError."""
        for looking in [self._submit(self._read, key, HEADER_BYTES) for key in keys]:
            looking()

    def _submit(self, call: Callable[..., T], *arguments: object) -> Callable[[], T]:
        """Begins a call in a thread; what is returned waits for it. Raises TierError once the tier is closed."""
        try:
            return self._looks.submit(call, *arguments).result
        except RuntimeError as error:
            raise TierError(f"the lines to {self._url} are closed") from error

    def _read(self, key: BlockKey, most_bytes: int) -> bytes | None:
        """The beginning of an object; None if there is none. Remembers which."""
        try:
            value = self._ask("read from", lambda: self._beginning(self._path(key), most_bytes))
        except FileNotFoundError:
            self._sightings.missed(key)
            return None
        self._sightings.seen(key)
        return value

    def _beginning(self, path: str, most_bytes: int) -> bytes:
        try:
            return self._store.cat_file(path, start=0, end=most_bytes)
        except OSError as error:
            if error.errno == errno.EINVAL and "range" in str(error):
                return b""  # S3 has no range of an empty object
            raise

    def _write(self, path: str, value: bytes) -> None:
        """The whole object under its name, or nothing."""
        if self._is_whole:
            self._store.pipe_file(path, value)
            return
        part = f"{path}.{secrets.token_hex(8)}.part"
        self._store.makedirs(path.rpartition("/")[0], exist_ok=True)
        try:
            self._store.pipe_file(part, value)
            self._store.mv(part, path)
        except Exception:
            with suppress(Exception):
                self._store.rm_file(part)
            raise

    def _remove(self, key: BlockKey) -> None:
        self._sightings.missed(key)
        with suppress(FileNotFoundError):
            self._ask("written to", lambda: self._store.rm_file(self._path(key)))

    def _ask(self, doing: str, call: Callable[[], T]) -> T:
        """Raises TierError, or FileNotFoundError if what is asked for is not there."""
        if self._is_closed:
            raise TierError(f"the lines to {self._url} are closed")
        try:
            return call()
        except FileNotFoundError:
            raise
        except Exception as error:  # the libraries of the stores raise what they like
            raise TierError(f"{self._url} cannot be {doing}: {type(error).__name__}: {error}") from error

    def _path(self, key: BlockKey) -> str:
        name = key.hex()
        return f"{self._root}/{name[:2]}/{name}"


class _Sightings:
    """Which keys were seen in the store, and which were not. Any thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: OrderedDict[BlockKey, None] = OrderedDict()
        self._absent_until_s: OrderedDict[BlockKey, float] = OrderedDict()

    def knows(self, key: BlockKey) -> bool:
        with self._lock:
            return key in self._seen

    def lacks(self, key: BlockKey) -> bool:
        with self._lock:
            return self._absent_until_s.get(key, 0.0) > self._clock.monotonic_s()

    def seen(self, key: BlockKey) -> None:
        with self._lock:
            self._absent_until_s.pop(key, None)
            _remember(self._seen, key, None)

    def missed(self, key: BlockKey) -> None:
        with self._lock:
            self._seen.pop(key, None)
            _remember(self._absent_until_s, key, self._clock.monotonic_s() + ABSENT_S)


def _remember(keys: OrderedDict[BlockKey, T], key: BlockKey, value: T) -> None:
    """As the newest; the oldest are forgotten."""
    keys[key] = value
    keys.move_to_end(key)
    while len(keys) > MAX_REMEMBERED:
        keys.popitem(last=False)


def _added(old: TierFigures, blocks: int = 0, num_bytes: int = 0, corrupt: int = 0) -> TierFigures:
    return TierFigures(blocks=old.blocks + blocks, num_bytes=old.num_bytes + num_bytes, corrupt=old.corrupt + corrupt)


def _header(key: BlockKey, digest: int, block: memoryview) -> bytes:
    return _HEADER.pack(_MAGIC, key, digest, len(block), seal(key, digest, block))


def _open(url: str) -> tuple[Store, str]:
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
    return cast(Store, store), str(root).rstrip("/")
