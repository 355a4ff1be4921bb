"""Baton's own transports, by scheme, as `baton bench transfer` drives them: the calls that the hand-off makes.

Memory and threading: see benchmarks/mover.py; a transport may have one thread of its own.
"""

from __future__ import annotations

from benchmarks.kv_pool import Pool
from benchmarks.mover import Job, Pause, wait_until
from core.errors import TransferError
from transport import native
from transport.base import Blocks, Endpoint, Landing, Transfer, TransferState, Transport


class TransportSender:
    """See benchmarks/mover.py."""

    def __init__(self, transport: Transport, pool: Pool) -> None:
        native.compile_now()
        self._transport = transport
        for region in pool.regions():
            transport.register(region)
        self._endpoint: Endpoint | None = None
        self._transfers: list[Transfer] = []

    def connect(self, description: bytes) -> None:
        self._endpoint = self._transport.connect(description)

    def write(self, job: Job, layers: range, *, is_last: bool) -> None:
        if self._endpoint is None:
            raise TransferError("not connected")
        for layer in layers:
            notice = b"landed" if is_last and layer == layers[-1] else None
            local, remote = Blocks(layer, job.local_ids), Blocks(layer, job.remote_ids)
            self._transfers.append(self._endpoint.write(job.tag, local, remote, notice))

    def finish(self) -> bool:
        pause = Pause("the writes end")
        while self._transfers:
            state = self._transfers[0].poll()
            if state is TransferState.FAILED:
                raise TransferError(self._transfers[0].failure())
            if state is TransferState.DONE:
                self._transfers.pop(0)
            else:
                pause.rest()
        return False

    def close(self) -> None:
        if self._endpoint is not None:
            self._endpoint.close()
        self._transport.close()


class TransportReceiver:
    """See benchmarks/mover.py."""

    def __init__(self, transport: Transport, pool: Pool) -> None:
        native.compile_now()
        self._transport = transport
        self._regions = pool.regions()
        for region in self._regions:
            transport.register(region)
        self._landing: Landing | None = None
        self._num_expected = 0

    def describe(self) -> bytes:
        return self._transport.describe()

    def expect(self, job: Job) -> None:
        blocks = [Blocks(region.id, job.remote_ids) for region in self._regions[: job.num_layers]]
        self._landing = self._transport.expect(job.tag, blocks)
        self._num_expected = len(blocks) * len(job.remote_ids)

    def receive(self) -> None:
        landing = self._landing
        if landing is None:
            raise TransferError("nothing is expected")
        wait_until(lambda: bool(landing.poll()), "the notice arrives")
        num_written = landing.num_written()
        landing.close()
        if num_written not in (None, self._num_expected):
            raise TransferError(f"the notice came after {num_written} of {self._num_expected} pieces")

    def close(self) -> None:
        self._transport.close()
