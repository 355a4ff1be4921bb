"""A CUDA GPU as Baton uses it beside the computation. Never run on a GPU yet: docs/design/0011-cuda-ipc.md.

Memory model: events are used again once nobody asks for them. The device is the one whose memory is checked first,
when the engine registers its KV cache; before that nothing is taken from the GPU. Its context is let go of once the
device is closed and the last lane and foreign memory are, which may end later, on an endpoint's thread.
Threading: see transport/device.py; nothing here synchronises.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from core.errors import TransferError
from transport.base import Memory
from transport.cuda_context import CudaContext
from transport.cuda_driver import (
    CONTROL_NODE,
    DEVICE_MEMORY,
    DEVICE_ORDINAL,
    HANDLE_BYTES,
    IS_IPC_CAPABLE,
    LIBRARY,
    MEMORY_TYPE,
    CudaDriver,
    IpcHandle,
)
from transport.cuda_lane import CudaLane, CudaMoment
from transport.cuda_pinned import PinnedMemory
from transport.device import Exported

_LAZY_PEER_ACCESS, _NO_TIMING = 1, 2


def unavailable() -> str:
    """See transport/schemes.py. Starts nothing: a process that asks may still fork."""
    try:
        ctypes.CDLL(LIBRARY)
        has_driver = True
    except OSError:
        has_driver = False
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = ""
    return why_unavailable(has_driver, CONTROL_NODE.exists(), torch)


def why_unavailable(has_driver: bool, has_gpu: bool, torch: str) -> str:
    """Why, and what to do about it; empty if nothing is missing. torch: its version, empty if there is none."""
    if not has_driver:
        return f"there is no NVIDIA driver ({LIBRARY}): install one, or use shm or zmq"
    if not has_gpu:
        return f"there is a driver but no GPU ({CONTROL_NODE}): give this container one (--gpus all)"
    if not torch or "+cpu" in torch:
        return f"torch {torch or '(not installed)'} has no CUDA: install baton-serve[gpu], whose torch has"
    return ""


@dataclass
class CudaMemory:
    """Of the GPU; freed when the device is closed."""

    address: int
    num_bytes: int


class CudaDevice:
    """See transport/device.py. compute_stream: the stream that computes now; without it `mark` takes all that
    this process gave to the GPU. Raises ConfigError if CUDA cannot start here."""

    def __init__(self, compute_stream: Callable[[], int] | None = None, driver: CudaDriver | None = None) -> None:
        self.driver = driver or CudaDriver()
        self._compute_stream = compute_stream
        self._context: CudaContext | None = None
        self._pinned = PinnedMemory(self.driver)
        self._spare: list[ctypes.c_void_p] = []
        self._lock = threading.Lock()
        self._num_uses = 0
        self._is_closed = False
        self._allocated: list[int] = []

    def take(self, ordinal: int) -> None:
        """This GPU, before any memory of it is checked. Raises TransferError if it refuses."""
        with self._lock:
            if self._context is None and not self._is_closed:
                self._context = CudaContext(self.driver, ordinal)

    def allocate(self, num_bytes: int) -> Memory | None:
        """None before any region of GPU memory is registered: the engine allocates its KV cache by itself."""
        if self._context is None:
            return None
        address = ctypes.c_uint64()
        with self._context:
            self.driver.call("cuMemAlloc_v2", ctypes.byref(address), num_bytes)
        self._allocated.append(address.value)
        return CudaMemory(address.value, num_bytes)

    def check(self, address: int, num_bytes: int) -> None:
        if self._attribute(MEMORY_TYPE, address) != DEVICE_MEMORY:
            raise TransferError(f"the memory at {address:#x} is not a GPU's: use shm or zmq for a KV cache on the host")
        ordinal = self._attribute(DEVICE_ORDINAL, address)
        self.take(ordinal)
        bound = self._bound().ordinal
        if bound != ordinal:
            raise TransferError(f"memory of GPU {ordinal}, where GPU {bound} was registered: one GPU per process")

    def export(self, address: int) -> Exported:
        with self._bound() as context:
            if not self._attribute(IS_IPC_CAPABLE, address):
                raise TransferError(
                    f"CUDA IPC cannot share the GPU memory at {address:#x}, which does not come from cudaMalloc: start "
                    "without expandable_segments and backend:cudaMallocAsync in PYTORCH_ALLOC_CONF, and without vLLM's "
                    "sleep mode, or use another transport"
                )
            base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), IpcHandle()
            self.driver.call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
            self.driver.call("cuIpcGetMemHandle", ctypes.byref(handle), base)
            return Exported(context.device, base.value, size.value, bytes(handle))

    def open(self, exported: Exported) -> int:
        if len(exported.handle) != HANDLE_BYTES:
            raise TransferError(f"a CUDA IPC handle has {HANDLE_BYTES} bytes, not {len(exported.handle)}")
        address, handle = ctypes.c_uint64(), IpcHandle.from_buffer_copy(exported.handle)
        context = self._begin_use()
        try:
            with context:
                context.check_peer(exported.device)
                self.driver.call("cuIpcOpenMemHandle_v2", ctypes.byref(address), handle, _LAZY_PEER_ACCESS)
        except TransferError:
            self.end_use()
            raise
        return address.value

    def shut(self, address: int) -> None:
        """A device that has failed unmaps nothing more, and runs nothing either."""
        context = self._context
        assert context is not None, "shut what was opened"
        with contextlib.suppress(TransferError), context:
            self.driver.call("cuIpcCloseMemHandle", address)
        self.end_use()

    def mark(self) -> CudaMoment:
        with self.recording() as event, self._bound() as context:
            if self._compute_stream is not None:
                self.driver.call("cuEventRecord", event, self._compute_stream())
            elif self.driver.has("cuCtxRecordEvent"):
                self.driver.call("cuCtxRecordEvent", context.handle, event)
            else:
                raise TransferError("the driver is older than CUDA 12.5: update it, or say which stream computes")
        return CudaMoment(self, event)

    def pin(self, address: int, num_bytes: int) -> int:
        context = self._begin_use()
        try:
            with context:
                return self._pinned.pin(address, num_bytes)
        except TransferError:
            self.end_use()
            raise

    def unpin(self, address: int) -> None:
        context = self._context
        assert context is not None, "unpin what was pinned"
        with contextlib.suppress(TransferError), context:
            self._pinned.unpin(address)
        self.end_use()

    def lane(self) -> CudaLane:
        context = self._begin_use()
        try:
            return CudaLane(self, context)
        except TransferError:
            self.end_use()
            raise

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
        self._release()

    def end_use(self) -> None:
        """A lane or foreign memory is closed."""
        with self._lock:
            self._num_uses -= 1
        self._release()

    @contextlib.contextmanager
    def recording(self) -> Iterator[ctypes.c_void_p]:
        """An event that nobody uses, to be recorded; given back where that fails."""
        event = self._event()
        try:
            yield event
        except TransferError:
            self.give_back(event)
            raise

    def give_back(self, event: ctypes.c_void_p) -> None:
        """It may be recorded again. What waits for its former moment goes on doing so: a wait is for the record that
        was the last when it was queued."""
        self._spare.append(event)

    def _begin_use(self) -> CudaContext:
        with self._lock:
            context = self._bound()
            self._num_uses += 1
        return context

    def _release(self) -> None:
        with self._lock:
            if not self._is_closed or self._num_uses or self._context is None:
                return
            context, self._context = self._context, None
        with contextlib.suppress(TransferError), context:
            for address in self._allocated:
                self.driver.call("cuMemFree_v2", address)
            for event in self._spare:
                self.driver.call("cuEventDestroy_v2", event)
        self._spare.clear()
        context.close()

    def _event(self) -> ctypes.c_void_p:
        with contextlib.suppress(IndexError):
            return self._spare.pop()
        event = ctypes.c_void_p()
        with self._bound():
            self.driver.call("cuEventCreate", ctypes.byref(event), _NO_TIMING)
        return event

    def _bound(self) -> CudaContext:
        context = self._context
        if self._is_closed:
            raise TransferError("the transport is closed")
        if context is None:
            raise TransferError("no region of GPU memory is registered: register the KV cache first")
        return context

    def _attribute(self, attribute: int, address: int) -> int:
        value = ctypes.c_uint(0)
        code = self.driver.status("cuPointerGetAttribute", ctypes.byref(value), attribute, address)
        if code == 1 and attribute == MEMORY_TYPE:  # invalid value: memory that CUDA has never heard of
            return 0
        if code:
            self.driver.refuse("cuPointerGetAttribute", code)
        return value.value
