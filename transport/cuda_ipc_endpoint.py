"""The connector's side of cuda_ipc: the device copies into the owner's memory, and the owner is told behind it.

    write: mark the computation ──▶ pipeline ──▶ lane.copy behind the mark        (caller's thread, never waits)
    thread: connect ──▶ say notices as copies land ──▶ once ended and landed: unmap, hang up

Memory model: nothing is unmapped while a copy that may touch it runs. Where `close` cannot wait for that (the device
takes longer than CLOSE_TIMEOUT_S), the thread does, and the transfers in question are RUNNING until then.
Threading: one thread per endpoint, from connecting until the end; it sleeps unless a notice has to follow a copy, and
then looks at the device every fraction of a millisecond. All of the pipeline and link is under one lock.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from core.errors import TransferError
from transport.base import Blocks, Region
from transport.cuda_ipc_link import CudaIpcLink
from transport.cuda_ipc_pipeline import CudaIpcTransfer, Pipeline
from transport.cuda_ipc_wire import CudaIpcDescription
from transport.device import Device
from transport.order import Order, order_read, order_write

CLOSE_TIMEOUT_S = 5.0
NEWS_PAUSE_S = 0.0002
IDLE_PAUSE_S = 0.5
"""How soon an idle endpoint lets go of the memory of an owner that has died."""


class CudaIpcEndpoint:
    """One owner's memory. `regions` is the transport's table of our own regions."""

    def __init__(self, device: Device, regions: Mapping[int, Region], description: CudaIpcDescription) -> None:
        self._device = device
        self._regions = regions
        self._remote = {region.id: region.at(0) for region in description.regions}
        self._lock = threading.Lock()
        self._pipeline = Pipeline()
        self._link: CudaIpcLink | None = None
        self._stir = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(description,), name="baton-cuda-ipc", daemon=True)
        self._thread.start()

    def write(self, tag: str, local: Blocks, remote: Blocks, notice: bytes | None = None) -> CudaIpcTransfer:
        return self._start(order_write(self._regions, self._remote, tag, local, remote, notice))

    def read(self, remote: Blocks, local: Blocks) -> CudaIpcTransfer:
        return self._start(order_read(self._regions, self._remote, remote, local))

    def failure(self) -> str:
        self._advance()
        return self._pipeline.why_ended

    def close(self) -> None:
        """Ends what waits, and waits for the device (never for the peer) to finish what it has."""
        with self._lock:
            self._pipeline.end("the endpoint is closed")
            is_connected = self._link is not None
        self._stir.set()
        if is_connected:
            self._thread.join(CLOSE_TIMEOUT_S)

    def _start(self, order: Order) -> CudaIpcTransfer:
        transfer = CudaIpcTransfer(order, self._device.mark(), self._advance)
        with self._lock:
            self._pipeline.add(transfer)
        self._advance()
        if order.notice is not None:
            self._stir.set()
        return transfer

    def _advance(self) -> None:
        with self._lock:
            self._step()

    def _step(self) -> None:
        """Under the lock."""
        try:
            if self._link is not None and not self._pipeline.why_ended and not self._link.owner.is_alive():
                self._pipeline.end("the peer hung up")
            self._pipeline.advance(self._link)
        except TransferError as error:
            self._pipeline.end(str(error))

    def _run(self, description: CudaIpcDescription) -> None:
        try:
            link = CudaIpcLink(self._device, description)
        except TransferError as error:
            with self._lock:
                self._pipeline.end(str(error))
            return
        with self._lock:
            self._link = link
        pause_s: float | None = 0.0
        while pause_s is not None:
            self._stir.wait(pause_s)
            self._stir.clear()
            pause_s = self._turn(link)

    def _turn(self, link: CudaIpcLink) -> float | None:
        """How long to wait for the next turn; None once everything has ended."""
        with self._lock:
            self._step()
            if self._pipeline.why_ended and self._pipeline.is_empty():
                self._link = None
                link.close()
                return None
            return NEWS_PAUSE_S if self._pipeline.has_news() else IDLE_PAUSE_S
