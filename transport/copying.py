"""Copies blocks between two registered memories: which bytes go where is worked out once, and used for every layer.

    block ids of a hand-off, shapes of two regions ──▶ CopyPlan, remembered ──▶ of every layer: slice = slice, ...

A model has a write per layer, all of the same blocks, so what surrounds a copy counts.

Memory model: addresses are raw: only what `transport.regions.resolve` let pass comes here. The last
PLANS_KEPT plans are kept, each of at most MAX_PIECES_KEPT pieces (0.3 kB per piece, so 20 MB at the very most);
longer lists have several.
Threading: pure functions. Small pieces are assigned between two views, under the interpreter's lock, at a third of what
a foreign call costs; large ones are copied by foreign calls, outside of it.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from core.errors import TransferError
from transport.base import Blocks, Region
from transport.regions import Span, check_pairing, known_ids, known_view, resolve
from transport.runs import runs

LARGEST_ASSIGNED_BYTES = 256 << 10
"""Some 50 us, for which no other thread of the process runs Python."""

MAX_PIECES_KEPT = 512
PLANS_KEPT = 128
"""The hand-offs of one forward pass write by turns, layer by layer: as many as there may be."""


class CopyPlan(NamedTuple):
    """slices: small pieces, from and to; moves: large ones, from, to and bytes. Both count from the first block's first
    byte of either side, as do from_extent and to_extent, bytes up to the last block's last byte."""

    slices: Sequence[tuple[slice, slice]]
    moves: Sequence[tuple[int, int, int]]
    from_extent: int
    to_extent: int

    def carry_out(self, from_address: int, to_address: int) -> None:
        """Copies between two regions of the shapes that it was made for."""
        if self.slices:
            source, target = known_view(from_address, self.from_extent), known_view(to_address, self.to_extent)
            for from_slice, to_slice in self.slices:
                target[to_slice] = source[from_slice]
        for from_at, to_at, num_bytes in self.moves:
            ctypes.memmove(to_address + to_at, from_address + from_at, num_bytes)


def plan_of(source: Region, local: Blocks, target: Region, remote: Blocks) -> CopyPlan | None:
    """What copies these blocks of one region to those of another. None if they do not fit, which `resolve` and
    `check_pairing` explain, or are too many for one plan."""
    if len(local.ids) > MAX_PIECES_KEPT:
        return None
    return _known_fitting_plan(
        local.ids,
        remote.ids,
        (source.block_bytes, source.stride, source.num_blocks, local.start, local.num_bytes),
        (target.block_bytes, target.stride, target.num_blocks, remote.start, remote.num_bytes),
    )


def copy_pairs(source: Span, source_ids: Sequence[int], target: Span, target_ids: Sequence[int]) -> None:
    """Copies block by block, or run by run where both sides are dense and consecutive."""
    if len(source_ids) != len(target_ids):
        raise ValueError(f"{len(source_ids)} pieces cannot be copied to {len(target_ids)} places")
    sides = [_Side(span.num_bytes, span.region.stride, span.region.num_blocks) for span in (source, target)]
    for at in range(0, len(source_ids), MAX_PIECES_KEPT):
        some = slice(at, at + MAX_PIECES_KEPT)
        plan = _plan(tuple(source_ids[some]), tuple(target_ids[some]), *sides)
        plan.carry_out(source.address(0), target.address(0))


class _Side(NamedTuple):
    """What a plan must know of a region: bytes of a piece and from one to the next."""

    num_bytes: int
    stride: int
    num_blocks: int

    def extent(self) -> int:
        """From the first block's piece to the end of the last one's."""
        return (self.num_blocks - 1) * self.stride + self.num_bytes


@functools.lru_cache(maxsize=PLANS_KEPT)
def _known_fitting_plan(
    source_ids: tuple[int, ...], target_ids: tuple[int, ...], source: tuple[int, ...], target: tuple[int, ...]
) -> CopyPlan | None:
    """source, target: block_bytes, stride, num_blocks; start and num_bytes of the range inside each block."""
    blocks = [Blocks(0, ids, *side[3:]) for ids, side in ((source_ids, source), (target_ids, target))]
    try:
        spans = [
            resolve({0: Region(0, 0, *side[:3])}, each, "") for each, side in zip(blocks, (source, target), strict=True)
        ]
        check_pairing(blocks[0], spans[0], blocks[1], spans[1])
    except TransferError:
        return None
    sides = [_Side(span.num_bytes, span.region.stride, span.region.num_blocks) for span in spans]
    return _plan(source_ids, target_ids, *sides)


@functools.lru_cache(maxsize=PLANS_KEPT)
def _plan(source_ids: tuple[int, ...], target_ids: tuple[int, ...], source: _Side, target: _Side) -> CopyPlan:
    size, slices, moves = source.num_bytes, [], []
    for from_id, to_id, count in _pieces(source_ids, target_ids, source, target):
        from_at, to_at, num_bytes = from_id * source.stride, to_id * target.stride, count * size
        if num_bytes > LARGEST_ASSIGNED_BYTES:
            moves.append((from_at, to_at, num_bytes))
        else:
            slices.append((slice(from_at, from_at + num_bytes), slice(to_at, to_at + num_bytes)))
    return CopyPlan(slices, moves, source.extent(), target.extent())


def _pieces(
    source_ids: tuple[int, ...], target_ids: tuple[int, ...], source: _Side, target: _Side
) -> Iterable[tuple[int, int, int]]:
    """First blocks and number of blocks of each copy: more than one where both sides are dense and consecutive."""
    is_dense = source.num_bytes == source.stride and target.num_bytes == target.stride
    if is_dense and known_ids(source_ids).may_have_run and known_ids(target_ids).may_have_run:
        return runs(source_ids, target_ids)
    return zip(source_ids, target_ids, itertools.repeat(1))
