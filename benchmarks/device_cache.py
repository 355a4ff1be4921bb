"""What the KV cache costs an engine on a GPU, beside plain copies of the same bytes, in one run and one process.

    python -m benchmarks.device_cache              on a GPU
    python -m benchmarks.device_cache --host       the same code on host memory: shows that it runs, measures no GPU

Per payload, each the median of several turns, from the call until the bytes are known to be in place and sound:

    down, up:   one contiguous copy by the driver, to pinned memory of the host and back
    store:      a step's blocks into the arena, all layers, with their digests
    load:       the same blocks back, compared
    digest:     what a hand-off's digest of these blocks takes

A block is 16 tokens of one layer of the named model, of LAYERS layers. The last line is JSON. The target: store at
least 0.7 of down, and load of up.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import random
import sys
import time
from typing import Any, Protocol

from benchmarks.gpu_ground import BLOCK_BYTES, GpuGround, Ground, ground, median_s, parser_of, speeds
from kvcache.arena import Arena, MappedArena
from kvcache.copiers import Copiers
from kvcache.device_copies import DeviceReads, DeviceWrites
from kvcache.orders import Piece
from kvcache.ranges import aligned
from transport.base import Region
from transport.cuda_device import unavailable
from transport.device_digest import DeviceDigests
from transport.faultpoint import FaultPoint
from transport.mapping import make_memfd

LAYERS = 32
KEY = bytes(32)


class Copies(Protocol):
    """The driver's own copies between an address of the device and the host."""

    def down(self, num_bytes: int) -> None: ...

    def up(self, num_bytes: int) -> None: ...


class HostCopies:
    """memmove."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self._address = address
        self._buffer = ctypes.create_string_buffer(num_bytes)

    def down(self, num_bytes: int) -> None:
        ctypes.memmove(self._buffer, self._address, num_bytes)

    def up(self, num_bytes: int) -> None:
        ctypes.memmove(self._address, self._buffer, num_bytes)


class TorchCopies:
    """torch's, with pinned memory."""

    def __init__(self, tensor: Any) -> None:
        import torch

        self._torch: Any = torch
        self._tensor = tensor
        self._pinned = torch.empty(tensor.numel(), dtype=torch.uint8, pin_memory=True)

    def down(self, num_bytes: int) -> None:
        self._pinned[:num_bytes].copy_(self._tensor[:num_bytes], non_blocking=True)
        self._torch.cuda.synchronize()

    def up(self, num_bytes: int) -> None:
        self._tensor[:num_bytes].copy_(self._pinned[:num_bytes], non_blocking=True)
        self._torch.cuda.synchronize()


class Stand:
    """One model's KV cache on the device, and an arena that has room for all of it."""

    def __init__(self, here: Ground, address: int, block_bytes: int, num_blocks: int) -> None:
        device, size = here.device, block_bytes * num_blocks
        self.regions = [
            Region(layer, address + layer * size, block_bytes, block_bytes, num_blocks) for layer in range(LAYERS)
        ]
        device.check(address, size * LAYERS)
        slot = aligned(block_bytes * LAYERS)
        fd = make_memfd(slot * num_blocks)
        self.arena = Arena(self.regions, lambda: (os.dup(fd), slot * num_blocks, "arena"), device=device)
        self.mapped: MappedArena = self.arena.map()
        os.close(fd)
        self.copiers = Copiers()
        self.reads = DeviceReads(device, self.regions, self.copiers, FaultPoint())
        self.writes = DeviceWrites(device, self.regions)
        self.digests = DeviceDigests(device)
        places = list(range(num_blocks))
        random.Random(7).shuffle(places)
        self.pieces = [Piece(block_id, place * slot, KEY) for place, block_id in enumerate(places)]

    def store(self) -> list[Piece]:
        """Returns what to load."""
        writing = self.writes.begin(self.mapped, self.pieces)
        for layer in range(LAYERS):
            writing.copy(layer)
        ends = zip(self.pieces, writing.end(), strict=True)
        return [Piece(piece.block_id, piece.offset, KEY, digest) for piece, digest in ends]

    def load(self, pieces: list[Piece]) -> None:
        """Raises RuntimeError if a block differs."""
        ordered = self.reads.mark()
        bad = self.reads.read_all(self.mapped, pieces, ordered)
        ordered.release()
        if bad:
            raise RuntimeError("a block differs from what was stored")

    def digest(self) -> None:
        total = self.digests.begin()
        for region in self.regions:
            total.add(region, [piece.block_id for piece in self.pieces], 0, full=True)
        while total.value() is None:
            time.sleep(0)
        total.release()

    def close(self) -> None:
        self.reads.close()
        self.writes.close()
        self.digests.close()
        self.copiers.close()
        self.arena.close()


def figures(stand: Stand, copies: Copies, payload: int) -> dict[str, float]:
    """Seconds per payload by name."""
    plain = {
        "down": median_s(functools.partial(copies.down, payload)),
        "up": median_s(functools.partial(copies.up, payload)),
    }
    stored = {"store": median_s(stand.store)}
    kept = stand.store()
    return plain | stored | {"load": median_s(functools.partial(stand.load, kept)), "digest": median_s(stand.digest)}


def measure(is_host: bool, megabytes: list[int]) -> list[dict[str, Any]]:
    """A row per model and payload, printed as it comes."""
    here, num_bytes, rows = ground(is_host), max(megabytes) << 20, []
    address = here.memory(num_bytes, 0)
    copies: Copies = HostCopies(address, num_bytes)
    if isinstance(here, GpuGround):
        copies = TorchCopies(here.tensor(address))
    for model, block_bytes in BLOCK_BYTES.items():
        for size in megabytes:
            num_blocks = max((size << 20) // (block_bytes * LAYERS), 1)
            payload = num_blocks * block_bytes * LAYERS
            stand = Stand(here, address, block_bytes, num_blocks)
            rows.append({"model": model, "bytes": payload, "blocks": num_blocks} | figures(stand, copies, payload))
            print(line(rows[-1]), flush=True)
            stand.close()
    here.device.close()
    return rows


def line(row: dict[str, Any]) -> str:
    """GB/s, and the ratios that matter."""
    speed, text = speeds(row, ("down", "up", "store", "load", "digest"))
    return f"{text}store/down {speed['store'] / speed['down']:.2f}  load/up {speed['load'] / speed['up']:.2f}"


def main() -> None:
    parser = parser_of("device_cache", __doc__)
    options = parser.parse_args()
    if why := "" if options.host else unavailable():
        sys.exit(f"there is no GPU to measure here: {why}")
    rows = measure(options.host, [int(size) for size in options.megabytes.split(",")])
    print(json.dumps({"is_host": options.host, "rows": rows}))


if __name__ == "__main__":
    main()
