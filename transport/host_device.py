"""A device made of host memory and threads: the cuda_ipc transport without a GPU.

    allocate: memfd, mapped         export: process, descriptor, inode       open: /proc/PID/fd/N, mapped
    lane: a thread that copies      mark: passed, unless the computation is held

It is as strict as CUDA: only whole allocations are exported, none can be opened in the process that made it, and a copy
that has begun cannot be taken back. With it every rule of the transport is tested on any machine; nothing is faster
this way than over shm, so no instance uses it but in tests (engine/devices.py).
Memory model: a mapping lives until `shut`; a memfd until `close` here and `shut` everywhere.
Threading: a thread per lane.
"""

from __future__ import annotations

import collections
import os
import threading
import time
from collections.abc import Callable, Sequence

import msgspec

from core.errors import TransferError
from transport.copying import copy_pairs
from transport.device import Exported, Moment
from transport.device_digest import words_sum
from transport.mapping import Mapping, make_memfd, map_foreign
from transport.regions import Span, view

DEVICE_NAME = "host memory"
_POLL_S = 0.02
_MASK = (1 << 64) - 1


class _Handle(msgspec.Struct, frozen=True, array_like=True):
    pid: int
    fd: int
    inode: int


class HostMoment:
    """Passed once `pass_on` was called and the device's lag is over; never if the device has failed."""

    def __init__(self, device: HostDevice, *, is_passed: bool = False, lag_s: float = 0.0) -> None:
        self._device = device
        self._due_s = time.monotonic() + lag_s
        self._passed = threading.Event()
        if is_passed:
            self._passed.set()

    def has_passed(self) -> bool:
        if self._device.why_failed:
            raise TransferError(self._device.why_failed)
        return self._passed.is_set() and time.monotonic() >= self._due_s

    def wait(self, timeout_s: float) -> bool:
        """Whether it has passed, after so long at most."""
        ends_s = time.monotonic() + timeout_s
        if not self._passed.wait(timeout_s):
            return False
        time.sleep(max(min(self._due_s, ends_s) - time.monotonic(), 0.0))
        return time.monotonic() >= self._due_s

    def pass_on(self) -> None:
        self._passed.set()

    def release(self) -> None:
        return


class HostTally:
    """Added up by a lane's thread."""

    def __init__(self, lane: HostLane) -> None:
        self._lane = lane
        self._total = 0
        self._last: HostMoment | None = None

    def add(self, span: Span, ids: Sequence[int], seed: int, after: Moment) -> None:
        self._last = self._lane.run(lambda: self._add(span, ids, seed), after)

    def value(self) -> int | None:
        return self._total & _MASK if self._last is None or self._last.has_passed() else None

    def release(self) -> None:
        return

    def _add(self, span: Span, ids: Sequence[int], seed: int) -> None:
        for position, block_id in enumerate(ids):
            self._total += words_sum(view(span.address(block_id), span.num_bytes), seed + position)


class HostLane:
    """Does what it is asked for, in that order."""

    def __init__(self, device: HostDevice) -> None:
        self._device = device
        self._work: collections.deque[tuple[HostMoment, Callable[[], None], HostMoment]] = collections.deque()
        self._stir = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="baton-host-lane", daemon=True)
        self._thread.start()

    def copy(
        self, source: Span, source_ids: Sequence[int], target: Span, target_ids: Sequence[int], after: Moment
    ) -> HostMoment:
        return self.run(lambda: copy_pairs(source, source_ids, target, target_ids), after)

    def tally(self) -> HostTally:
        return HostTally(self)

    def run(self, work: Callable[[], None], after: Moment) -> HostMoment:
        """Does this once `after` has passed."""
        if self._device.why_failed:
            raise TransferError(self._device.why_failed)
        assert isinstance(after, HostMoment)
        done = HostMoment(self._device)
        with self._stir:
            self._work.append((after, work, done))
            self._stir.notify()
        return done

    def close(self) -> None:
        with self._stir:
            self._is_closed = True
            self._stir.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._stir:
                self._stir.wait_for(lambda: self._work or self._is_closed)
                if self._is_closed:
                    return
                after, work, done = self._work.popleft()
            while not after.wait(_POLL_S):
                if self._is_closed or self._device.why_failed:
                    return
            work()
            done.pass_on()


class HostDevice:
    """See transport/device.py. `hold` and `let_go` are the computation, `fail` is the device's end. lag_s: by how much
    the computation is always behind what it was given."""

    def __init__(self, lag_s: float = 0.0) -> None:
        self.why_failed = ""
        self._lag_s = lag_s
        self._own: dict[int, tuple[Mapping, int]] = {}
        self._opened: dict[int, Mapping] = {}
        self._held: list[HostMoment] | None = None
        self._lock = threading.Lock()

    def allocate(self, num_bytes: int) -> Mapping:
        """A fresh allocation. Raises TransferError if there is no memory."""
        fd = make_memfd(num_bytes)
        try:
            memory = Mapping(fd, num_bytes)
            memory.populate()
        except TransferError:
            os.close(fd)
            raise
        self._own[memory.address] = (memory, fd)
        return memory

    def check(self, address: int, num_bytes: int) -> None:
        """All host memory can be copied."""
        return

    def export(self, address: int) -> Exported:
        for memory, fd in self._own.values():
            if memory.address <= address < memory.address + memory.num_bytes:
                handle = _Handle(os.getpid(), fd, os.fstat(fd).st_ino)
                return Exported(DEVICE_NAME, memory.address, memory.num_bytes, msgspec.msgpack.encode(handle))
        raise TransferError("this memory was not allocated by the device: allocate it there")

    def open(self, exported: Exported) -> int:
        if exported.device != DEVICE_NAME:
            raise TransferError(f"memory of {exported.device!r} cannot be reached from {DEVICE_NAME}")
        try:
            handle = msgspec.msgpack.decode(exported.handle, type=_Handle)
            if handle.pid == os.getpid():
                raise TransferError("a handle cannot be opened in the process that made it")
            fd = os.open(f"/proc/{handle.pid}/fd/{handle.fd}", os.O_RDWR | os.O_CLOEXEC)
        except (msgspec.DecodeError, OSError) as error:
            raise TransferError(f"the peer's memory cannot be opened: {error}") from error
        try:
            if os.fstat(fd).st_ino != handle.inode:
                raise TransferError("the peer's memory is gone")
            memory = map_foreign(fd, exported.num_bytes)
        finally:
            os.close(fd)
        with self._lock:
            self._opened[memory.address] = memory
        return memory.address

    def shut(self, address: int) -> None:
        with self._lock:
            memory = self._opened.pop(address)
        memory.close()

    def mark(self) -> HostMoment:
        with self._lock:
            moment = HostMoment(self, is_passed=self._held is None, lag_s=self._lag_s)
            if self._held is not None:
                self._held.append(moment)
        return moment

    def pin(self, address: int, num_bytes: int) -> int:
        """It is where it is."""
        return address

    def unpin(self, address: int) -> None:
        return

    def lane(self) -> HostLane:
        return HostLane(self)

    def close(self) -> None:
        for _, fd in self._own.values():
            os.close(fd)
        self._own.clear()

    def hold(self) -> None:
        """From now on the computation stands still: what is marked does not pass."""
        with self._lock:
            self._held = self._held or []

    def let_go(self) -> None:
        """The computation goes on, and everything marked meanwhile passes."""
        with self._lock:
            held, self._held = self._held or [], None
        for moment in held:
            moment.pass_on()

    def fail(self, why: str) -> None:
        """As when a kernel of the computation wrote out of bounds: nothing runs any more."""
        self.why_failed = why
