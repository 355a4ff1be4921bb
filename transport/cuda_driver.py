"""The CUDA driver's functions that Baton calls, with their types and errors.

Straight to libcuda.so.1: what it has published never changes, every machine with a GPU has it, and loading it starts
nothing (`CudaDriver()` does, which must not happen before a process forks). Signatures as in cuda.h of CUDA 13.0.
Memory model: none. Threading: CUDA's functions may be called from any thread; ctypes lets go of the interpreter lock.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from pathlib import Path

from core.errors import ConfigError, TransferError

LIBRARY = "libcuda.so.1"
CONTROL_NODE = Path("/dev/nvidiactl")
NOT_READY = 600
HANDLE_BYTES = 64
MEMORY_TYPE, DEVICE_ORDINAL, IS_IPC_CAPABLE = 2, 9, 10
"""CUpointer_attribute."""
DEVICE_MEMORY = 2
"""CUmemorytype."""
_REMEDIES: dict[int, str] = {
    2: "there is not enough memory",
    3: "CUDA does not survive a fork: start the worker with VLLM_WORKER_MULTIPROC_METHOD=spawn",
    46: "another process has this GPU for itself (nvidia-smi -c DEFAULT changes that)",
    100: "no GPU is visible: look at CUDA_VISIBLE_DEVICES, and whether the container was given one",
    201: "for an IPC handle: both processes must share the process namespace (--pid), and be two",
    205: "the two GPUs may not reach each other (nvidia-smi topo -p2p rw), or the peer is gone",
    217: "the two GPUs do not reach each other (nvidia-smi topo -p2p rw): use nixl, ucx or shm",
    222: "the driver is older than CUDA 11.8: update it",
    400: "for an IPC handle: the peer is gone, or in a container with process numbers of its own (--pid)",
    712: "this memory of the host is pinned already",
    801: "this GPU or system has no CUDA IPC (MIG instances, WSL, vGPU): use another transport",
}


class IpcHandle(ctypes.Structure):
    """CUipcMemHandle."""

    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


class Uuid(ctypes.Structure):
    """CUuuid."""

    _fields_ = (("bytes", ctypes.c_ubyte * 16),)


_SIGNATURES: dict[str, tuple[object, ...]] = {
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGetUuid_v2": (POINTER(Uuid), c_int),
    "cuDeviceCanAccessPeer": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuModuleLoadData": (POINTER(c_void_p), c_char_p),
    "cuModuleUnload": (c_void_p,),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuLaunchKernel": (c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p), POINTER(c_void_p)),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamQuery": (c_void_p,),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventDestroy_v2": (c_void_p,),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventQuery": (c_void_p,),
    "cuPointerGetAttribute": (c_void_p, c_int, c_uint64),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
    "cuMemHostGetDevicePointer_v2": (POINTER(c_uint64), c_void_p, c_uint),
    "cuMemGetAddressRange_v2": (POINTER(c_uint64), POINTER(c_size_t), c_uint64),
    "cuIpcGetMemHandle": (POINTER(IpcHandle), c_uint64),
    "cuIpcOpenMemHandle_v2": (POINTER(c_uint64), IpcHandle, c_uint),
    "cuIpcCloseMemHandle": (c_uint64,),
}
_OPTIONAL: dict[str, tuple[object, ...]] = {"cuCtxRecordEvent": (c_void_p, c_void_p)}
"""Since CUDA 12.5."""


class CudaDriver:
    """Initialises CUDA in this process. Raises ConfigError if that cannot be."""

    def __init__(self, library: str = LIBRARY) -> None:
        try:
            self._library = ctypes.CDLL(library)
            functions = {name: getattr(self._library, name) for name in _SIGNATURES}
        except (OSError, AttributeError) as error:
            raise ConfigError(f"the NVIDIA driver cannot be loaded: {error}: install or update it") from error
        self._functions = functions | {n: getattr(self._library, n) for n in _OPTIONAL if hasattr(self._library, n)}
        for name, function in self._functions.items():
            function.argtypes = list((_SIGNATURES | _OPTIONAL)[name])
            function.restype = c_int
        try:
            self.call("cuInit", 0)
        except TransferError as error:
            raise ConfigError(f"CUDA cannot start: {error}") from error

    def has(self, name: str) -> bool:
        """Whether the driver is new enough for this function."""
        return name in self._functions

    def status(self, name: str, *arguments: object) -> int:
        """Calls a function: its CUresult, 0 for success."""
        return int(self._functions[name](*arguments))

    def call(self, name: str, *arguments: object) -> None:
        """Calls a function. Raises TransferError, with the remedy where one is known, unless it succeeds."""
        code = self.status(name, *arguments)
        if code:
            self.refuse(name, code)

    def refuse(self, name: str, code: int) -> None:
        """Raises TransferError for a CUresult."""
        text = c_char_p()
        self.status("cuGetErrorName", code, ctypes.byref(text))
        remedy = _REMEDIES.get(code)
        raise TransferError(
            f"{name} failed: {(text.value or b'unknown error').decode()} ({code})" + (f": {remedy}" if remedy else "")
        )
