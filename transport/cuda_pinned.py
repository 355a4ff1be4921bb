"""Memory of the host that a CUDA GPU may copy from and to, pinned piece by piece.

One registration of 512 GiB or more is refused whatever memory is free, and on some hosts one of more than some 96 GiB
(vllm-project/vllm#51080, local-inference-lab/vllm#217). Pinning takes about 0.1 s per GB.
Memory model: what is pinned stays mapped until `unpin`.
Threading: with the GPU's context current; one address is pinned and unpinned by one thread at a time.
"""

from __future__ import annotations

import contextlib
import ctypes

from core.errors import TransferError
from transport.cuda_driver import CudaDriver

PIECE_BYTES = 64 << 30
_FOR_ALL_CONTEXTS, _MAPPED = 1, 2
"""Flags of cuMemHostRegister."""


class PinnedMemory:
    """All that one device has pinned, by address."""

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver
        self._pieces: dict[int, list[int]] = {}

    def pin(self, address: int, num_bytes: int) -> int:
        """Where the GPU sees it. Raises TransferError, with nothing pinned, if it cannot be, or not in one piece."""
        pieces: list[int] = []
        seen_at = []
        try:
            for offset in range(0, num_bytes, PIECE_BYTES):
                size = min(PIECE_BYTES, num_bytes - offset)
                self._driver.call("cuMemHostRegister_v2", address + offset, size, _FOR_ALL_CONTEXTS | _MAPPED)
                pieces.append(address + offset)
                result = ctypes.c_uint64()
                self._driver.call("cuMemHostGetDevicePointer_v2", ctypes.byref(result), address + offset, 0)
                seen_at.append(result.value - offset)
            if len(set(seen_at)) != 1:
                raise TransferError("the GPU sees its pieces apart")
        except TransferError as error:
            self._unregister(pieces)
            raise TransferError(
                f"{num_bytes} bytes of the host's memory cannot be pinned for the GPU; fewer may be (--cache): {error}"
            ) from error
        self._pieces[address] = pieces
        return seen_at[0]

    def unpin(self, address: int) -> None:
        """A device that has failed unpins nothing more."""
        self._unregister(self._pieces.pop(address))

    def _unregister(self, pieces: list[int]) -> None:
        for piece in pieces:
            with contextlib.suppress(TransferError):
                self._driver.call("cuMemHostUnregister", piece)
