"""Blocks over UCX: RDMA where there is any, TCP elsewhere, GPU memory too; every byte counted and acknowledged.

    engine's thread                      I/O thread (owns the UCX worker and every socket)
    write ──▶ queue ─── doorbell ──▶ UcxLink, one per peer ═══ UCX ═══▶ UcxCaller, UcxPayloads ──▶ landing, own regions

Endpoints are made through `ucxx`, in its synchronous API; why that one, and what UCX cannot protect us from, stands in
docs/design/0015-ucx.md. In short: it is for networks whose hosts trust each other.

Memory model: any memory will do, as long as it stays mapped until `close`. At most WINDOW_BYTES per peer are under
way; the rest of a write is only block numbers in a queue.
Threading: one I/O thread per transport, which never waits for a single peer. A transfer is DONE only when the receiver
has said that its bytes are in place. The fence is the receiver's `Landing.close`, or the end of every transfer.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from core.clock import Clock, SystemClock
from core.errors import BatonError, TransferError
from transport.base import Blocks, Memory, Region
from transport.frames import RegionShape, shape_region
from transport.landing import CountedLanding, Inbox
from transport.pieces import PiecewiseTransfer, Task
from transport.piecewise_endpoint import PiecewiseEndpoint
from transport.regions import check_region, check_words
from transport.ucx_library import Lease, why_unavailable
from transport.ucx_link import CONNECT_TIMEOUT_S, UcxLink
from transport.ucx_receiver import UcxReceiver
from transport.ucx_socket import UcxDoor
from transport.ucx_thread import UcxThread
from transport.ucx_wire import MAX_MESSAGE_BYTES, PROTOCOL_VERSION, UcxDescription, decode_description, encode
from transport.ucx_worker import UcxWorker


def make(host: str) -> UcxTransport:
    """See transport/schemes.py. Raises ConfigError if the host is not ours."""
    return UcxTransport(host)


def unavailable() -> str:
    """See transport/schemes.py."""
    return why_unavailable()


def is_reachable(description: bytes) -> bool:
    """See transport/schemes.py: only a try will tell."""
    return True


class UcxTransport:
    """See transport/base.py. `host`: an address of this machine that peers can reach."""

    def __init__(self, host: str, clock: Clock | None = None) -> None:
        self.scheme = "ucx"
        self._clock = clock or SystemClock()
        self._regions: dict[int, Region] = {}
        self._inbox = Inbox()
        self._token = secrets.token_hex(16)
        self._lease = Lease(host)
        try:
            self._door = UcxDoor(host)
            worker = UcxWorker(self._lease)
        except BatonError:
            self._lease.give_back()
            raise
        receiver = UcxReceiver(worker, self._token, self._regions, self._inbox)
        self._io = UcxThread(worker, self._door, receiver, self._clock)
        self._io.start()

    @property
    def malformed(self) -> int:
        """Messages that were dropped because they do not parse or contradict themselves."""
        return self._io.malformed()

    def allocate(self, num_bytes: int) -> Memory | None:
        return None

    def register(self, region: Region) -> None:
        check_region(region, self._regions)
        self._regions[region.id] = region
        if region.device is not None:
            self._io.use_device(region.device)

    def describe(self) -> bytes:
        regions = list(self._regions.values())
        shapes = [RegionShape(each.id, each.block_bytes, each.num_blocks) for each in regions]
        on_device = [each.id for each in regions if each.device is not None]
        return encode(UcxDescription("ucx", PROTOCOL_VERSION, self._door.address, self._token, shapes, on_device))

    def connect(self, description: bytes) -> PiecewiseEndpoint[PiecewiseTransfer]:
        parsed = decode_description(description)
        if not self._io.is_open():
            raise TransferError("the transport is closed")
        remote = {shape.id: shape_region(shape) for shape in parsed.regions}
        link = UcxLink(parsed, self._clock.monotonic_s() + CONNECT_TIMEOUT_S, self._io.wake)
        self._io.adopt(link)
        on_device = set(parsed.on_device)
        return PiecewiseEndpoint(self._regions, remote, link, lambda task: _transfer(task, link, on_device))

    def expect(self, tag: str, blocks: Sequence[Blocks]) -> CountedLanding:
        check_words(tag, None)
        landing = self._inbox.open(tag, blocks, self._regions)
        self._io.wake()
        return landing

    def close(self) -> None:
        """Ends the I/O thread and every endpoint."""
        if self._io.is_open():
            self._io.close()
            self._lease.give_back()


def _transfer(task: Task, link: UcxLink, on_device: set[int]) -> PiecewiseTransfer:
    """on_device: the peer's regions in a GPU's memory. Nothing gathers or scatters there: such blocks travel one by
    one."""
    is_on_device = task.local.region.device is not None or task.remote.region.id in on_device
    frame_bytes = min(MAX_MESSAGE_BYTES, task.local.num_bytes) if is_on_device else MAX_MESSAGE_BYTES
    return PiecewiseTransfer(task, link.cancel, frame_bytes)
