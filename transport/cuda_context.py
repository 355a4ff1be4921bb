"""One GPU's CUDA context in this process, the one that torch uses, with our kernels loaded into it.

Memory model: the primary context is retained until `close`; so is the module with the kernels.
Threading: `with context:` makes it the calling thread's current one and puts back what was; nestable, any thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import uuid
from types import TracebackType

from core.errors import TransferError
from transport.cuda_driver import CudaDriver, Uuid
from transport.cuda_kernels import PTX, SUM_KERNEL, UNITS, kernel_name


class CudaContext:
    """Raises TransferError if the GPU refuses."""

    def __init__(self, driver: CudaDriver, ordinal: int) -> None:
        self._driver = driver
        self.ordinal = ordinal
        self.device = device_name(driver, ordinal)
        self.handle = ctypes.c_void_p()
        self._module = ctypes.c_void_p()
        driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(self.handle), ordinal)
        with self:
            driver.call("cuModuleLoadData", ctypes.byref(self._module), PTX.read_bytes())
            self.copies = {unit: self._kernel(kernel_name(unit)) for unit in UNITS}
            self.sum_words = self._kernel(SUM_KERNEL)

    def __enter__(self) -> CudaContext:
        self._driver.call("cuCtxPushCurrent_v2", self.handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._driver.status("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def close(self) -> None:
        """Lets go of the kernels and of the context."""
        with contextlib.suppress(TransferError), self:
            self._driver.call("cuModuleUnload", self._module)
        self._driver.status("cuDevicePrimaryCtxRelease_v2", self.ordinal)

    def check_peer(self, device: str) -> None:
        """Raises TransferError if this GPU cannot reach the other's memory. One that this process does not see is only
        found out about by opening its handle."""
        count, can_access = ctypes.c_int(), ctypes.c_int(1)
        self._driver.call("cuDeviceGetCount", ctypes.byref(count))
        for ordinal in range(count.value):
            if ordinal != self.ordinal and device_name(self._driver, ordinal) == device:
                self._driver.call("cuDeviceCanAccessPeer", ctypes.byref(can_access), self.ordinal, ordinal)
        if not can_access.value:
            raise TransferError(
                f"GPU {self.device} cannot reach the memory of GPU {device} (nvidia-smi topo -p2p rw): "
                "use another transport"
            )

    def _kernel(self, name: str) -> ctypes.c_void_p:
        function = ctypes.c_void_p()
        self._driver.call("cuModuleGetFunction", ctypes.byref(function), self._module, name.encode())
        return function


def device_name(driver: CudaDriver, ordinal: int) -> str:
    """The GPU's UUID (the MIG instance's where there is one): the same in every process."""
    name = Uuid()
    driver.call("cuDeviceGetUuid_v2", ctypes.byref(name), ordinal)
    return str(uuid.UUID(bytes=bytes(name)))
