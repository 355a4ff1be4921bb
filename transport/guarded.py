"""Any transport, used by two threads: the engine's, which moves blocks, and the one that measures paths.

Memory model: as the wrapped transport.
Threading: one lock per transport around every call, so an implementation need not expect two callers at once. No call
waits for a peer, so none holds the lock for longer than a copy that it makes itself.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from transport.base import Blocks, Endpoint, Landing, Memory, Region, Transfer, TransferState, Transport


class GuardedTransport:
    """Wraps a transport. See transport/base.py."""

    def __init__(self, inner: Transport) -> None:
        self.scheme = inner.scheme
        self.inner = inner
        self._lock = threading.RLock()

    def allocate(self, num_bytes: int) -> Memory | None:
        with self._lock:
            return self.inner.allocate(num_bytes)

    def register(self, region: Region) -> None:
        with self._lock:
            self.inner.register(region)

    def describe(self) -> bytes:
        with self._lock:
            return self.inner.describe()

    def connect(self, description: bytes) -> Endpoint:
        with self._lock:
            return _GuardedEndpoint(self.inner.connect(description), self._lock)

    def expect(self, tag: str, blocks: Sequence[Blocks]) -> Landing:
        with self._lock:
            return _GuardedLanding(self.inner.expect(tag, blocks), self._lock)

    def close(self) -> None:
        with self._lock:
            self.inner.close()


class _GuardedEndpoint:
    """Wraps an endpoint."""

    def __init__(self, inner: Endpoint, lock: threading.RLock) -> None:
        self._inner = inner
        self._lock = lock

    def write(self, tag: str, local: Blocks, remote: Blocks, notice: bytes | None = None) -> Transfer:
        with self._lock:
            return _GuardedTransfer(self._inner.write(tag, local, remote, notice), self._lock)

    def read(self, remote: Blocks, local: Blocks) -> Transfer:
        with self._lock:
            return _GuardedTransfer(self._inner.read(remote, local), self._lock)

    def failure(self) -> str:
        with self._lock:
            return self._inner.failure()

    def close(self) -> None:
        with self._lock:
            self._inner.close()


class _GuardedTransfer:
    """Wraps a transfer."""

    def __init__(self, inner: Transfer, lock: threading.RLock) -> None:
        self._inner = inner
        self._lock = lock

    @property
    def copy_s(self) -> float:
        with self._lock:
            return self._inner.copy_s

    def poll(self) -> TransferState:
        with self._lock:
            return self._inner.poll()

    def cancel(self) -> None:
        with self._lock:
            self._inner.cancel()

    def failure(self) -> str:
        with self._lock:
            return self._inner.failure()


class _GuardedLanding:
    """Wraps a landing."""

    def __init__(self, inner: Landing, lock: threading.RLock) -> None:
        self._inner = inner
        self._lock = lock

    def poll(self) -> list[bytes]:
        with self._lock:
            return self._inner.poll()

    def num_written(self) -> int | None:
        with self._lock:
            return self._inner.num_written()

    def digest(self) -> int | None:
        with self._lock:
            return self._inner.digest()

    def peer_gone(self) -> bool:
        with self._lock:
            return self._inner.peer_gone()

    def has_writer(self) -> bool:
        with self._lock:
            return self._inner.has_writer()

    def close(self) -> bool:
        with self._lock:
            return self._inner.close()
