"""The real CUDA device code on a CUDA driver in software (software_driver.cpp), compiled once per session."""

from __future__ import annotations

import atexit
import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from transport.cuda_device import CudaDevice
from transport.cuda_driver import CudaDriver

SOURCE = Path(__file__).with_name("software_driver.cpp")
HEADERS = Path("/usr/local/cuda/include")


class Allocation:
    """A `transport.base.Memory` in the software GPU."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.address = address
        self.num_bytes = num_bytes


class SoftwareGpu(CudaDevice):
    """A `CudaDevice` that also allocates, as the engine would."""

    def __init__(self, library: str, compute_stream: Callable[[], int] | None = None) -> None:
        super().__init__(compute_stream, CudaDriver(library))
        self._of_engine: list[int] = []
        self.library = ctypes.CDLL(library)
        self.library.software_allocate.restype = ctypes.c_uint64
        self.library.software_allocate.argtypes = [ctypes.c_size_t, ctypes.c_int, ctypes.c_int]
        self.library.software_free.argtypes = [ctypes.c_uint64]
        self.library.software_compute_stream.restype = ctypes.c_void_p
        self.library.software_end.argtypes = [ctypes.c_void_p]
        self.library.software_pin_at_most.argtypes = [ctypes.c_size_t]
        self.library.software_hold.argtypes = [ctypes.c_void_p, ctypes.c_int]

    def allocate(self, num_bytes: int, *, is_ipc_capable: bool = True, gpu: int = 0) -> Allocation:
        self._of_engine.append(self.library.software_allocate(num_bytes, is_ipc_capable, gpu))
        return Allocation(self._of_engine[-1], num_bytes)

    def close(self) -> None:
        super().close()
        for address in self._of_engine:
            self.library.software_free(address)
        self._of_engine.clear()

    def count(self, what: str) -> int:
        """What is left of it, in this process (in this thread for contexts)."""
        names = ("launches", "streams", "events", "opened", "retained", "contexts", "pinned", "memories")
        return int(self.library.software_count(names.index(what)))


@functools.cache
def software_library() -> str:
    """The driver's path; empty where there is no compiler. Raises CalledProcessError if it does not compile, which it
    does not if a signature differs from that in CUDA's header."""
    compiler = shutil.which("g++")
    if compiler is None:
        return ""
    folder = tempfile.mkdtemp(prefix="baton-software-gpu-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library = Path(folder) / "libcuda.so.1"
    headers = [f"-I{HEADERS}"] if HEADERS.is_dir() else []
    options = ["-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-pthread"]
    subprocess.run([compiler, *options, *headers, str(SOURCE), "-o", str(library)], check=True, timeout=100)
    return str(library)
