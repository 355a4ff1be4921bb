"""A peer in a process of its own, for tests that stop or kill it. Speaks JSON lines on its standard streams.

python -m tests.transport.peer_process own SCHEME              says its description, expects tag "t", counts
python -m tests.transport.peer_process write SCHEME HEX         writes all its blocks under tag "t"
python -m tests.transport.peer_process pour SCHEME HEX          the same again and again, there and back
python -m tests.transport.peer_process storm SCHEME HEX         writes them over and over, also after a refusal
python -m tests.transport.peer_process send SCHEME HEX          random blocks, in parts, in any order; says their digest
python -m tests.transport.peer_process held HEX                 the same over cuda_ipc, and its GPU does not get to it
python -m tests.transport.peer_process control                  says its control address
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from core.handoff import Peer
from tests.fakes.software_gpu import SoftwareGpu
from tests.poll import until
from tests.transport.memory import Owned
from transport.base import Blocks, TransferState, Transport
from transport.conformance_pair import finish
from transport.control import Callbacks, ControlPlane, Identity
from transport.cuda_ipc import CudaIpcTransport
from transport.host_device import HostDevice
from transport.schemes import make_transport

NUM_BLOCKS = 16
BLOCK_BYTES = 1 << 19
ROOT = Path(__file__).parents[2]


class PeerProcess:
    """Starts it; kills it in the end."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "tests.transport.peer_process", *arguments]
        self._child = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._child.kill()
        self._child.wait()
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.close()
        self._child.stdout.close()

    def says(self, timeout_s: float = 20.0) -> Any:
        """Its next line."""
        assert self._child.stdout is not None
        readable, _, _ = select.select([self._child.stdout], [], [], timeout_s)
        assert readable, "the peer process says nothing"
        return json.loads(self._child.stdout.readline())

    def asks(self) -> Any:
        """Makes it look once more, and say what it sees."""
        assert self._child.stdin is not None
        self._child.stdin.write("\n")
        self._child.stdin.flush()
        return self.says()

    def signal(self, number: signal.Signals) -> None:
        """Killed or stopped, it is when this returns, with every thread."""
        self._child.send_signal(number)
        if number == signal.SIGKILL:
            self._child.wait()
        if number == signal.SIGSTOP:
            tasks = Path(f"/proc/{self._child.pid}/task")
            until(lambda: all(b") T" in each.read_bytes() for each in tasks.glob("*/stat")), what="the stop")


def say(words: object) -> None:
    print(json.dumps(words), flush=True)


def own(scheme: str) -> None:
    owned = Owned(transport_of(scheme), BLOCK_BYTES, NUM_BLOCKS, fill=0)
    landing = owned.expect("t", range(NUM_BLOCKS))
    say(owned.transport.describe().hex())
    notices: list[str] = []
    for _ in sys.stdin:
        notices += [notice.decode() for notice in landing.poll()]
        say(
            {
                "notices": notices,
                "written": landing.num_written(),
                "digest": landing.digest(),
                "first": owned.block(0)[0],
                "pid": os.getpid(),
            }
        )
    owned.transport.close()


def write(scheme: str, description: str) -> None:
    owned = Owned(transport_of(scheme), BLOCK_BYTES, NUM_BLOCKS, fill=7)
    endpoint = owned.transport.connect(bytes.fromhex(description))
    transfer = endpoint.write("t", owned.blocks(range(NUM_BLOCKS)), owned.blocks(range(NUM_BLOCKS)), b"done")
    until(lambda: transfer.poll() is not TransferState.RUNNING, 10.0, "the write ends")
    say(transfer.poll().value)
    sys.stdin.read()


def pour(scheme: str, description: str) -> None:
    owned = Owned(make_transport(scheme, "127.0.0.1"), BLOCK_BYTES, NUM_BLOCKS, fill=7)
    endpoint = owned.transport.connect(bytes.fromhex(description))
    together = range(NUM_BLOCKS)
    for turn in range(100_000):
        ids = together if turn % 2 == 0 else together[::-1]
        transfer = endpoint.write("t", owned.blocks(together), owned.blocks(ids))
        until(lambda: transfer.poll() is not TransferState.RUNNING, 20.0, "the write ends")  # noqa: B023
        if turn == 0:
            say(transfer.poll().value)


def storm(scheme: str, description: str) -> None:
    owned = Owned(make_transport(scheme, "127.0.0.1"), BLOCK_BYTES, NUM_BLOCKS, fill=7)
    endpoint = owned.transport.connect(bytes.fromhex(description))
    ids = owned.blocks(range(NUM_BLOCKS))
    finish(endpoint.write("t", ids, ids))
    say("storming")
    while True:
        transfer = endpoint.write("t", ids, ids)
        until(lambda: transfer.poll() is not TransferState.RUNNING, 10.0, "the write ends")  # noqa: B023
        if endpoint.failure():
            say(endpoint.failure())
            sys.stdin.read()


def send(scheme: str, description: str) -> None:
    owned = Owned(make_transport(scheme, "127.0.0.1"), BLOCK_BYTES, NUM_BLOCKS)
    dice = random.Random(11)
    ctypes.memmove(owned.region.address, dice.randbytes(BLOCK_BYTES * NUM_BLOCKS), BLOCK_BYTES * NUM_BLOCKS)
    endpoint = owned.transport.connect(bytes.fromhex(description))
    ids = dice.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    for block_id in ids[:-1]:
        cut = dice.randrange(1, BLOCK_BYTES)
        for start, num_bytes in ((0, cut), (cut, BLOCK_BYTES - cut)):
            part = Blocks(0, (block_id,), start, num_bytes)
            endpoint.write("t", part, part)
    finish(endpoint.write("t", owned.blocks(ids[-1:]), owned.blocks(ids[-1:]), b"done"))
    say(owned.digest(range(NUM_BLOCKS)))
    sys.stdin.read()


def held(description: str) -> None:
    device = HostDevice()
    owned = Owned(CudaIpcTransport(device), BLOCK_BYTES, NUM_BLOCKS, fill=7)
    endpoint = owned.transport.connect(bytes.fromhex(description))
    first = endpoint.write("t", owned.blocks([0]), owned.blocks([0]), b"first")
    until(lambda: first.poll() is TransferState.DONE, 10.0, "the first write")
    device.hold()
    transfer = endpoint.write("t", owned.blocks([1]), owned.blocks([1]), b"second")
    say(transfer.poll().value)
    sys.stdin.read()


def transport_of(scheme: str) -> Transport:
    """A transport by name; cuda_ipc on a device made of host memory, cuda_ipc:LIBRARY on a CUDA driver in software."""
    name, _, library = scheme.partition(":")
    if name != "cuda_ipc":
        return make_transport(scheme, "127.0.0.1")
    return CudaIpcTransport(SoftwareGpu(library) if library else HostDevice())


def control() -> None:
    plane = ControlPlane(
        "127.0.0.1", Identity("other", "boot", "print"), Callbacks(lambda envelope: say(envelope.handoff))
    )
    say(plane.address)
    sys.stdin.read()
    plane.close()


def peer_at(address: str) -> Peer:
    return Peer("other", address, "boot")


if __name__ == "__main__":
    modes: dict[str, Callable[..., None]] = {
        "own": own,
        "write": write,
        "pour": pour,
        "storm": storm,
        "send": send,
        "held": held,
        "control": control,
    }
    modes[sys.argv[1]](*sys.argv[2:])
