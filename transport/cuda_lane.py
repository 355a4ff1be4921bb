"""A side stream of a CUDA GPU: copies and digests of blocks beside the computation, and the events that tell of them.

    computation's stream ── event ──▶ side stream: wait, kernel, kernel, event ──▶ asked by CudaMoment.has_passed

Never run on a GPU yet: docs/design/0011-cuda-ipc.md.
Memory model: events go back to their device once nobody asks for them; sums of digests lie in pinned memory, which is
used again, and let go of with the lane.
Threading: see transport/device.py; nothing here synchronises.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import mmap
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from core.errors import TransferError
from transport.cuda_context import CudaContext
from transport.cuda_driver import NOT_READY
from transport.cuda_kernels import NUM_SUMS, NUM_THREADS, SUM_THREADS, WORD_BYTES, Batch, Summed, fill, fill_sum
from transport.device import Moment
from transport.regions import Span

if TYPE_CHECKING:
    from transport.cuda_device import CudaDevice

_NON_BLOCKING = 1
DRAIN_TIMEOUT_S = 5.0


class CudaMoment:
    """An event that was recorded."""

    def __init__(self, device: CudaDevice, event: ctypes.c_void_p) -> None:
        self._device = device
        self.event = event

    def has_passed(self) -> bool:
        code = self._device.driver.status("cuEventQuery", self.event)
        if code not in (0, NOT_READY):
            self._device.driver.refuse("cuEventQuery", code)
        return code == 0

    def release(self) -> None:
        self._device.give_back(self.event)


class CudaTally:
    """Sums in pinned memory of the host, one per thread of a launch. Launches add to them; the processor joins them."""

    def __init__(self, device: CudaDevice, lane: CudaLane) -> None:
        """Raises TransferError if the GPU refuses."""
        self._lane = lane
        self._device = device
        self._sums = mmap.mmap(-1, NUM_SUMS * WORD_BYTES)
        self._anchor: ctypes.c_char | None = ctypes.c_char.from_buffer(self._sums)
        self._address = ctypes.addressof(self._anchor)
        self._device_address = device.pin(self._address, NUM_SUMS * WORD_BYTES)
        self._last: CudaMoment | None = None

    def add(self, span: Span, ids: Sequence[int], seed: int, after: Moment) -> None:
        self._follow(self._lane.add_up(span, ids, seed, self._device_address, after))

    def value(self) -> int | None:
        if not self.is_idle():
            return None
        numpy: Any = importlib.import_module("numpy")
        return int(numpy.frombuffer(self._sums, numpy.uint64).sum(dtype=numpy.uint64))

    def release(self) -> None:
        self._lane.take_back(self)

    def is_idle(self) -> bool:
        """Whether no launch adds to it any more."""
        return self._last is None or self._last.has_passed()

    def begin_again(self) -> None:
        """For somebody else."""
        self._follow(None)
        ctypes.memset(self._address, 0, NUM_SUMS * WORD_BYTES)

    def close(self) -> None:
        """Nothing adds to it any more."""
        self._follow(None)
        self._device.unpin(self._address)
        self._anchor = None
        self._sums.close()

    def _follow(self, last: CudaMoment | None) -> None:
        if self._last is not None:
            self._last.release()
        self._last = last


class CudaLane:
    """A side stream."""

    def __init__(self, device: CudaDevice, context: CudaContext) -> None:
        self._device = device
        self._context = context
        self._batch, self._summed = Batch(), Summed()
        self._arguments = (ctypes.c_void_p * 1)(ctypes.addressof(self._batch))
        self._sum_arguments = (ctypes.c_void_p * 1)(ctypes.addressof(self._summed))
        self._tallies: list[CudaTally] = []
        self._spare: list[CudaTally] = []
        self._stream = ctypes.c_void_p()
        with context:
            device.driver.call("cuStreamCreate", ctypes.byref(self._stream), _NON_BLOCKING)

    def copy(
        self, source: Span, source_ids: Sequence[int], target: Span, target_ids: Sequence[int], after: Moment
    ) -> CudaMoment:
        assert isinstance(after, CudaMoment)
        driver, stream = self._device.driver, self._stream
        with self._device.recording() as done, self._context:
            driver.call("cuStreamWaitEvent", stream, after.event, 0)
            for launch in fill(self._batch, source, source_ids, target, target_ids):
                kernel = self._context.copies[launch.unit]
                shape = (launch.grid_x, launch.grid_y, 1, NUM_THREADS, 1, 1, 0)
                driver.call("cuLaunchKernel", kernel, *shape, stream, self._arguments, None)
            driver.call("cuEventRecord", done, stream)
        return CudaMoment(self._device, done)

    def tally(self) -> CudaTally:
        """One that was used before, if the GPU is done with it."""
        for index, tally in enumerate(self._spare):
            if tally.is_idle():
                del self._spare[index]
                tally.begin_again()
                return tally
        self._tallies.append(CudaTally(self._device, self))
        return self._tallies[-1]

    def add_up(self, span: Span, ids: Sequence[int], seed: int, sums: int, after: Moment) -> CudaMoment:
        """Adds the words of blocks to NUM_SUMS words at `sums`."""
        assert isinstance(after, CudaMoment)
        driver, stream = self._device.driver, self._stream
        with self._device.recording() as done, self._context:
            driver.call("cuStreamWaitEvent", stream, after.event, 0)
            for num_tiles in fill_sum(self._summed, span, ids, seed, sums):
                shape = (num_tiles, 1, 1, SUM_THREADS, 1, 1, 0)
                driver.call("cuLaunchKernel", self._context.sum_words, *shape, stream, self._sum_arguments, None)
            driver.call("cuEventRecord", done, stream)
        return CudaMoment(self._device, done)

    def take_back(self, tally: CudaTally) -> None:
        """Nobody asks for it any more."""
        self._spare.append(tally)

    def close(self) -> None:
        """Waits, bounded, for what a refused copy may have left behind: usually nothing."""
        deadline_s = time.monotonic() + DRAIN_TIMEOUT_S
        with contextlib.suppress(TransferError), self._context:
            while self._device.driver.status("cuStreamQuery", self._stream) == NOT_READY:
                if time.monotonic() > deadline_s:
                    break
                threading.Event().wait(0.001)
            self._device.driver.call("cuStreamDestroy_v2", self._stream)
        for tally in self._tallies:
            tally.close()
        self._device.end_use()
