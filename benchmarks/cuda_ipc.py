"""cuda_ipc beside a plain device-to-device copy of the same bytes, in one run, between two processes.

    python -m benchmarks.cuda_ipc                  on a GPU; --owner-gpu 1 puts the receiver on another
    python -m benchmarks.cuda_ipc --host           the same code on host memory: shows that it runs, measures no GPU

Three figures per payload, each the median of several turns, from the call until the bytes are known to be in place:

    copy:    one contiguous copy of the payload by the driver, to the same GPU as the receiver's
    write:   one write of all blocks, scattered on both sides
    layers:  the payload as 32 writes, one after the other without waiting, as a model's layers push it

and, since a copy within one GPU takes as long as its launch, the same with eight payloads under way at once. A block is
16 tokens of one layer of the named model. The last line is JSON. The target: write at least 0.8 of copy above 64 MB.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.gpu_ground import BLOCK_BYTES, ground, median_s, parser_of, speeds
from transport.base import Blocks, Endpoint, Region, Transfer, TransferState
from transport.cuda_ipc import CudaIpcTransport, unavailable

NUM_LAYERS = 32
UNDER_WAY = 8
WAIT_S = 30.0


def register(transport: CudaIpcTransport, address: int, num_bytes: int) -> None:
    """The memory as each model's KV cache: one region per model."""
    for index, block_bytes in enumerate(BLOCK_BYTES.values()):
        transport.register(Region(index, address, block_bytes, block_bytes, num_bytes // block_bytes))


def own(is_host: bool, num_bytes: int, gpu: int) -> None:
    """The receiving process: says its description, and lives until its input ends."""
    here = ground(is_host)
    transport = CudaIpcTransport(here.device)
    register(transport, here.memory(num_bytes, gpu), num_bytes)
    print(transport.describe().hex(), flush=True)
    sys.stdin.read()
    transport.close()


@contextmanager
def owner(is_host: bool, num_bytes: int, gpu: int) -> Iterator[bytes]:
    """The receiving process's description."""
    command = [sys.executable, "-m", "benchmarks.cuda_ipc", "--own", str(num_bytes), "--owner-gpu", str(gpu)]
    command += ["--host"] if is_host else []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            yield bytes.fromhex(child.stdout.readline())
        finally:
            child.kill()


def wait(transfers: list[Transfer]) -> None:
    """Until all are done. Raises RuntimeError if one is not."""
    deadline_s = time.monotonic() + WAIT_S
    for transfer in transfers:
        while transfer.poll() is TransferState.RUNNING:
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"a transfer still runs after {WAIT_S} s")
        if transfer.poll() is not TransferState.DONE:
            raise RuntimeError(transfer.failure())


def split(blocks: Blocks, parts: int) -> list[Blocks]:
    """In equal parts, as far as they go."""
    size = max(len(blocks.ids) // parts, 1)
    return [Blocks(blocks.region, blocks.ids[at : at + size]) for at in range(0, len(blocks.ids), size)]


def figures(endpoint: Endpoint, local: Blocks, remote: Blocks, copy: Callable[[int], None]) -> dict[str, float]:
    """Seconds per payload by name."""
    layers = list(zip(split(local, NUM_LAYERS), split(remote, NUM_LAYERS), strict=True))
    return {
        "copy": median_s(lambda: copy(1)),
        "write": median_s(lambda: wait([endpoint.write("t", local, remote)])),
        "layers": median_s(lambda: wait([endpoint.write("t", here, there) for here, there in layers])),
        "copies": median_s(lambda: copy(UNDER_WAY)) / UNDER_WAY,
        "writes": median_s(lambda: wait([endpoint.write("t", local, remote) for _ in range(UNDER_WAY)])) / UNDER_WAY,
    }


def measure(is_host: bool, megabytes: list[int], gpu: int) -> list[dict[str, Any]]:
    """A row per model and payload, printed as it comes."""
    num_bytes = max(megabytes) << 20
    here, rows, dice = ground(is_host), [], random.Random(7)
    source, plain = here.memory(num_bytes, 0), here.memory(num_bytes, gpu)
    transport = CudaIpcTransport(here.device)
    register(transport, source, num_bytes)
    with owner(is_host, num_bytes, gpu) as description:
        endpoint = transport.connect(description)
        for region, (model, block_bytes) in enumerate(BLOCK_BYTES.items()):
            for size in megabytes:
                count, total = (size << 20) // block_bytes, num_bytes // block_bytes
                payload = count * block_bytes
                local, remote = (Blocks(region, tuple(dice.sample(range(total), count))) for _ in range(2))
                copy = functools.partial(here.copy, plain, source, payload)
                rows.append({"model": model, "bytes": payload, "blocks": count})
                rows[-1] |= figures(endpoint, local, remote, copy)
                print(line(rows[-1]), flush=True)
        endpoint.close()
    transport.close()
    return rows


def line(row: dict[str, Any]) -> str:
    """GB/s, and the ratios that matter."""
    speed, text = speeds(row, ("copy", "write", "layers", "copies", "writes"))
    return f"{text}write/copy {speed['write'] / speed['copy']:.2f}  under way {speed['writes'] / speed['copies']:.2f}"


def main() -> None:
    parser = parser_of("cuda_ipc", __doc__)
    parser.add_argument("--owner-gpu", type=int, default=0, help="the receiver's GPU (default: %(default)s)")
    parser.add_argument("--own", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.own:
        own(options.host, options.own, options.owner_gpu)
        return
    if why := "" if options.host else unavailable():
        sys.exit(f"cuda_ipc cannot run here: {why}")
    rows = measure(options.host, [int(size) for size in options.megabytes.split(",")], options.owner_gpu)
    print(json.dumps({"is_host": options.host, "owner_gpu": options.owner_gpu, "rows": rows}))


if __name__ == "__main__":
    main()
