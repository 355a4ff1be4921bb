"""The kernel that copies many blocks at once: its code, its arguments and the shape of its launches.

    python -m transport.cuda_ipc_kernel        compiles cuda_ipc_kernel.cu to cuda_ipc_kernel.ptx again (needs nvcc)

Block numbers travel as the launch's own argument (4,040 of the 4,096 bytes that every driver takes), which CUDA copies
when the kernel is launched: there is no staging memory that would have to outlive it. 4,096 blocks are nine launches.
Memory model: a `Batch` is filled again for each launch. Threading: one batch per lane, used under its endpoint's lock.
"""

from __future__ import annotations

import array
import ctypes
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from core.errors import TransferError
from transport.regions import Span

MAX_BLOCKS = 500
NUM_THREADS = 256
UNROLL = 4
UNITS = (16, 4, 1)
"""Bytes that one thread moves at once, best first."""
SOURCE = Path(__file__).with_name("cuda_ipc_kernel.cu")
PTX = Path(__file__).with_name("cuda_ipc_kernel.ptx")
PTX_VERSION = "7.8"
"""Read by every driver since CUDA 11.8; nothing newer is used."""


class Batch(ctypes.Structure):
    """The kernel's only argument, as the .cu declares it."""

    _fields_ = (
        ("source", ctypes.c_uint64),
        ("target", ctypes.c_uint64),
        ("source_stride", ctypes.c_uint64),
        ("target_stride", ctypes.c_uint64),
        ("num_units", ctypes.c_uint64),
        ("source_ids", ctypes.c_uint32 * MAX_BLOCKS),
        ("target_ids", ctypes.c_uint32 * MAX_BLOCKS),
    )


class Launch(NamedTuple):
    """One launch of `copy_<unit>` with the batch as it is now."""

    unit: int
    grid_x: int
    grid_y: int


def kernel_name(unit: int) -> str:
    """As in the .cu."""
    return f"copy_{unit}"


def unit_of(source: Span, target: Span) -> int:
    """The most bytes that divide every address and size of a copy."""
    together = source.address(0) | target.address(0) | source.num_bytes | source.region.stride | target.region.stride
    return next(unit for unit in UNITS if together % unit == 0)


def fill(
    batch: Batch, source: Span, source_ids: Sequence[int], target: Span, target_ids: Sequence[int]
) -> Iterator[Launch]:
    """Fills the batch for one launch after the other; each must be launched before the next is asked for. Raises
    TransferError if a block's number has more than 32 bits."""
    unit = unit_of(source, target)
    batch.source, batch.source_stride = source.address(0), source.region.stride
    batch.target, batch.target_stride = target.address(0), target.region.stride
    batch.num_units = source.num_bytes // unit
    grid_x = -(-batch.num_units // (NUM_THREADS * UNROLL))
    try:
        sources, targets = array.array("I", source_ids), array.array("I", target_ids)
    except OverflowError as error:
        raise TransferError(f"a block's number does not fit into 32 bits: {error}") from error
    for first in range(0, len(sources), MAX_BLOCKS):
        count = min(MAX_BLOCKS, len(sources) - first)
        for ids, place in ((sources, batch.source_ids), (targets, batch.target_ids)):
            ctypes.memmove(place, ids.buffer_info()[0] + first * ids.itemsize, count * ids.itemsize)
        yield Launch(unit, grid_x, count)


def compile_ptx() -> str:
    """The PTX of the .cu, for the oldest GPU that vLLM serves and the oldest driver that reads it. Needs nvcc."""
    command = ["nvcc", "-ptx", "-arch=compute_75", str(SOURCE), "-o", "-"]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    lines = [line for line in text.splitlines() if line and not line.startswith("//")]
    return "\n".join(f".version {PTX_VERSION}" if line.startswith(".version") else line for line in lines) + "\n"


if __name__ == "__main__":
    PTX.write_text(compile_ptx())
