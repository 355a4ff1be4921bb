"""A transport that knows nothing of GPUs, used with a GPU's memory: a write begins when its blocks are computed.

    write ──▶ mark the computation ──▶ queue ── a thread, as marks pass ──▶ the transport's own write, in order

NIXL and UCX read a GPU's memory as soon as they are asked to, and the engine asks right behind the launch of a layer,
while the GPU is still at it. cuda_ipc waits by itself, on the GPU.

Memory model: as the wrapped transport; memory that must be the transport's own is the device's.
Threading: one lock per endpoint; one thread per transport, which looks at the device every fraction of a millisecond
while a write waits and sleeps otherwise. `poll` looks as well.
"""

from __future__ import annotations

import collections
import threading
import time
import weakref
from collections.abc import Callable, Sequence

from core.errors import TransferError
from transport.base import Blocks, Endpoint, Landing, Memory, Region, Transfer, TransferState, Transport
from transport.device import Device, Moment

_PAUSE_S = 0.0002
_IDLE_PAUSE_S = 0.5
_CLOSE_TIMEOUT_S = 5.0


class BehindComputation:
    """Wraps a transport whose regions lie in a device's memory, and which expects two callers at once
    (transport/guarded.py). Closes the device with the transport."""

    def __init__(self, inner: Transport, device: Device) -> None:
        self.scheme = inner.scheme
        self._inner = inner
        self._device = device
        self._pump = _Pump()

    def allocate(self, num_bytes: int) -> Memory | None:
        return self._device.allocate(num_bytes)

    def register(self, region: Region) -> None:
        """Raises TransferError if the region's memory is not the device's."""
        self._device.check(region.address, (region.num_blocks - 1) * region.stride + region.block_bytes)
        self._inner.register(region)

    def describe(self) -> bytes:
        return self._inner.describe()

    def connect(self, description: bytes) -> BehindEndpoint:
        endpoint = BehindEndpoint(self._inner.connect(description), self._device, self._pump)
        self._pump.add(endpoint)
        return endpoint

    def expect(self, tag: str, blocks: Sequence[Blocks]) -> Landing:
        return self._inner.expect(tag, blocks)

    def close(self) -> None:
        self._pump.close()
        self._inner.close()
        self._device.close()


class BehindTransfer:
    """See transport/base.py: Transfer. RUNNING, too, until it begins."""

    def __init__(self, endpoint: BehindEndpoint, computed: Moment) -> None:
        self._endpoint = endpoint
        self.computed = computed
        self.begun: Transfer | None = None
        self.why_failed = ""

    @property
    def copy_s(self) -> float:
        return self.begun.copy_s if self.begun is not None else 0.0

    def poll(self) -> TransferState:
        self._endpoint.advance()
        if self.begun is not None:
            return self.begun.poll()
        return TransferState.FAILED if self.why_failed else TransferState.RUNNING

    def cancel(self) -> None:
        self._endpoint.cancel(self)

    def failure(self) -> str:
        return self.begun.failure() if self.begun is not None else self.why_failed


class BehindEndpoint:
    """See transport/base.py: Endpoint. Arguments that do not fit are refused when the write begins: at once if the
    device has nothing to compute."""

    def __init__(self, inner: Endpoint, device: Device, pump: _Pump) -> None:
        self._inner = inner
        self._device = device
        self._pump = pump
        self._lock = threading.Lock()
        self._waiting: collections.deque[tuple[BehindTransfer, Callable[[], Transfer]]] = collections.deque()

    def write(self, tag: str, local: Blocks, remote: Blocks, notice: bytes | None = None) -> BehindTransfer:
        transfer = BehindTransfer(self, self._device.mark())
        with self._lock:
            if not self._waiting and transfer.computed.has_passed():
                transfer.computed.release()
                transfer.begun = self._inner.write(tag, local, remote, notice)
                return transfer
            self._waiting.append((transfer, lambda: self._inner.write(tag, local, remote, notice)))
        self._pump.stir()
        return transfer

    def read(self, remote: Blocks, local: Blocks) -> Transfer:
        """Begins at once: nobody computes with what it fills."""
        with self._lock:
            return self._inner.read(remote, local)

    def failure(self) -> str:
        with self._lock:
            return self._inner.failure()

    def close(self) -> None:
        with self._lock:
            self._end_all("the endpoint is closed")
            self._inner.close()

    def advance(self) -> bool:
        """Begins what has been computed, in the order of the writes; whether more waits."""
        with self._lock:
            try:
                while self._waiting and self._waiting[0][0].computed.has_passed():
                    self._begin(*self._waiting.popleft())
            except TransferError as error:
                self._end_all(str(error))
            return bool(self._waiting)

    def cancel(self, transfer: BehindTransfer) -> None:
        with self._lock:
            if transfer.begun is not None:
                transfer.begun.cancel()
                return
            self._waiting = collections.deque(each for each in self._waiting if each[0] is not transfer)
            self._end(transfer, "cancelled")

    def _begin(self, transfer: BehindTransfer, write: Callable[[], Transfer]) -> None:
        transfer.computed.release()
        try:
            transfer.begun = write()
        except TransferError as error:
            transfer.why_failed = str(error)

    def _end_all(self, why: str) -> None:
        while self._waiting:
            self._end(self._waiting.popleft()[0], why)

    def _end(self, transfer: BehindTransfer, why: str) -> None:
        if not transfer.why_failed:
            transfer.why_failed = why
            transfer.computed.release()


class _Pump:
    """The thread that begins writes while nobody polls them."""

    def __init__(self) -> None:
        self._endpoints: weakref.WeakSet[BehindEndpoint] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._stir = threading.Event()
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def add(self, endpoint: BehindEndpoint) -> None:
        with self._lock:
            self._endpoints.add(endpoint)
            if self._thread is None and not self._is_closed:
                self._thread = threading.Thread(target=self._run, name="baton-behind", daemon=True)
                self._thread.start()

    def stir(self) -> None:
        """A write waits."""
        self._stir.set()

    def close(self) -> None:
        """What waits is for its endpoint to end."""
        self._is_closed = True
        self._stir.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while not self._is_closed:
            with self._lock:
                endpoints = list(self._endpoints)
            is_waiting = any([endpoint.advance() for endpoint in endpoints])
            del endpoints
            if not is_waiting:
                self._stir.wait(_IDLE_PAUSE_S)
                self._stir.clear()
            else:
                time.sleep(_PAUSE_S)
