"""cuda_ipc on a real GPU. Never run yet: whoever has one runs `pytest -m gpu tests/transport/test_cuda_ipc_gpu.py`."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.poll import until
from tests.transport.peer_process import ROOT
from transport.base import Blocks, TransferState
from transport.conformance import check_transport
from transport.conformance_pair import finish
from transport.cuda_ipc import CudaIpcTransport, unavailable
from transport.faulty import Faults, FaultyTransport

if TYPE_CHECKING:
    from tests.transport.gpu_peer import GpuOwned

WHY_NOT = unavailable()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(WHY_NOT), reason=f"no GPU for cuda_ipc here: {WHY_NOT}")]
BLOCK_BYTES, NUM_BLOCKS = 1 << 16, 64
SLEEP_CYCLES = 1 << 30
"""Half a second or so of a GPU's time."""


class Peer:
    """tests/transport/gpu_peer.py as a child."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self.child = child

    def says(self) -> Any:
        assert self.child.stdout is not None
        readable, _, _ = select.select([self.child.stdout], [], [], 60)
        assert readable, "the peer process says nothing"
        return json.loads(self.child.stdout.readline())

    def asks(self) -> Any:
        assert self.child.stdin is not None
        self.child.stdin.write("\n")
        self.child.stdin.flush()
        return self.says()


@contextmanager
def peer(**environment: str) -> Iterator[Peer]:
    command = [sys.executable, "-m", "tests.transport.gpu_peer", str(BLOCK_BYTES), str(NUM_BLOCKS)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            yield Peer(child)
        finally:
            child.kill()


def owned() -> GpuOwned:
    from tests.transport.gpu_peer import GpuOwned

    return GpuOwned(BLOCK_BYTES, NUM_BLOCKS)


def sleep_on_the_gpu() -> None:
    import torch

    torch.cuda._sleep(SLEEP_CYCLES)


def test_it_does_what_every_transport_must() -> None:
    from tests.transport.gpu_peer import TorchGpu

    check_transport(lambda: CudaIpcTransport(TorchGpu()))
    check_transport(lambda: FaultyTransport(CudaIpcTransport(TorchGpu()), Faults(delay_polls=3, delay_s=0.002)))


def test_another_process_s_gpu_memory_is_written_behind_the_computation() -> None:
    sender = owned()
    with peer() as other:
        endpoint = sender.transport.connect(bytes.fromhex(other.says()))
        everything = Blocks(0, tuple(range(NUM_BLOCKS)))
        finish(endpoint.write("t", everything, everything, b"zeroes"))
        sleep_on_the_gpu()
        sender.memory.fill(0, BLOCK_BYTES * NUM_BLOCKS, 42)
        transfer = endpoint.write("t", everything, everything, b"layer")
        assert transfer.poll() is TransferState.RUNNING, "it should wait for the computation, and not block on it"
        finish(transfer)
        seen = other.asks()
        assert seen["notices"] == ["zeroes", "layer"]
        assert seen["firsts"] == [42] * NUM_BLOCKS
        read = endpoint.read(Blocks(0, (5,)), Blocks(0, (6,)))
        finish(read)
        endpoint.close()
        until(lambda: other.asks()["gone"], 5.0, "the fence of a closed endpoint")
    sender.transport.close()


def test_an_owner_that_is_killed_in_mid_write_does_not_take_our_gpu_with_it() -> None:
    sender = owned()
    everything = Blocks(0, tuple(range(NUM_BLOCKS)))
    with peer() as other:
        endpoint = sender.transport.connect(bytes.fromhex(other.says()))
        finish(endpoint.write("t", everything, everything))
        sleep_on_the_gpu()
        flying = [endpoint.write("t", everything, everything) for _ in range(50)]
        other.child.send_signal(signal.SIGKILL)
        until(endpoint.failure, 2.0, "the endpoint fails")
        until(lambda: all(each.poll() is not TransferState.RUNNING for each in flying), 10.0, "what flew has landed")
    endpoint.close()
    sender.memory.fill(0, BLOCK_BYTES, 7)
    assert sender.block(0) == bytes([7]) * BLOCK_BYTES, "our context is broken: the driver freed memory under a copy"
    sender.transport.close()


def test_expandable_segments_are_refused_with_the_remedy() -> None:
    with peer(PYTORCH_ALLOC_CONF="expandable_segments:True") as other:
        assert other.child.stderr is not None
        assert "start without expandable_segments" in other.child.stderr.read()
