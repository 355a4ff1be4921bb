"""The kernels that copy and that digest many blocks at once: their code, arguments and the shape of their launches.

    python -m transport.cuda_kernels        compiles cuda_kernels.cu to cuda_kernels.ptx again (needs nvcc)

Block numbers travel as the launch's own argument (up to 4,048 of the 4,096 bytes that every driver takes), which CUDA
copies when the kernel is launched: there is no staging memory that would have to outlive it. 4,096 blocks are nine
launches of a copy, five of a digest.
Memory model: an argument is filled again for each launch. Threading: one of each per lane, used under its owner's lock.
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
MAX_SUMMED = 1000
NUM_TILES = 64
SUM_THREADS = 128
NUM_SUMS = NUM_TILES * SUM_THREADS
"""Words of 8 bytes that a digest adds up in, one per thread: what 250 blocks of 128 KiB take is some 40 rounds each."""
SUM_KERNEL = "sum_words"
WORD_BYTES = 8
UNITS = (16, 4, 1)
"""Bytes that one thread moves at once, best first."""
SOURCE = Path(__file__).with_name("cuda_kernels.cu")
PTX = Path(__file__).with_name("cuda_kernels.ptx")
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


class Summed(ctypes.Structure):
    """The only argument of `sum_words`, as the .cu declares it."""

    _fields_ = (
        ("source", ctypes.c_uint64),
        ("stride", ctypes.c_uint64),
        ("num_words", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("sums", ctypes.c_uint64),
        ("num_blocks", ctypes.c_uint32),
        ("num_tiles", ctypes.c_uint32),
        ("ids", ctypes.c_uint32 * MAX_SUMMED),
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
    sources, targets = _numbers(source_ids), _numbers(target_ids)
    for first in range(0, len(sources), MAX_BLOCKS):
        count = min(MAX_BLOCKS, len(sources) - first)
        _put(batch.source_ids, sources, first, count)
        _put(batch.target_ids, targets, first, count)
        yield Launch(unit, grid_x, count)


def fill_sum(summed: Summed, span: Span, ids: Sequence[int], seed: int, sums: int) -> Iterator[int]:
    """Fills the argument of `sum_words` for one launch after the other, and says how many tiles it has; each must be
    launched before the next is asked for. seed: of the first block; sums: NUM_SUMS words. Raises TransferError if a
    block is not made of words, or its number has more than 32 bits."""
    if (span.address(0) | span.region.stride | span.num_bytes) % WORD_BYTES:
        raise TransferError(f"a digest is of words of {WORD_BYTES} bytes, and {span.num_bytes} are no number of them")
    summed.source, summed.stride, summed.sums = span.address(0), span.region.stride, sums
    summed.num_words = span.num_bytes // WORD_BYTES
    numbers = _numbers(ids)
    for first in range(0, len(numbers), MAX_SUMMED):
        count = min(MAX_SUMMED, len(numbers) - first)
        _put(summed.ids, numbers, first, count)
        summed.seed, summed.num_blocks, summed.num_tiles = seed + first, count, min(NUM_TILES, count)
        yield summed.num_tiles


def _numbers(ids: Sequence[int]) -> array.array[int]:
    try:
        return array.array("I", ids)
    except OverflowError as error:
        raise TransferError(f"a block's number does not fit into 32 bits: {error}") from error


def _put(place: ctypes.Array[ctypes.c_uint32], numbers: array.array[int], first: int, count: int) -> None:
    ctypes.memmove(place, numbers.buffer_info()[0] + first * numbers.itemsize, count * numbers.itemsize)


def compile_ptx() -> str:
    """The PTX of the .cu, for the oldest GPU that vLLM serves and the oldest driver that reads it. Needs nvcc."""
    command = ["nvcc", "-ptx", "-arch=compute_75", str(SOURCE), "-o", "-"]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    lines = [line for line in text.splitlines() if line and not line.startswith("//")]
    return "\n".join(f".version {PTX_VERSION}" if line.startswith(".version") else line for line in lines) + "\n"


if __name__ == "__main__":
    PTX.write_text(compile_ptx())
