"""Copies blocks between two registered memories: which bytes go where is worked out once, and used for every layer.

    block ids of a hand-off, shapes of two regions ──▶ CopyPlan, remembered ──▶ of every layer: one call

A model has a write per layer, all of the same blocks, so what surrounds a copy counts.

Memory model: addresses are raw: only what `transport.regions.resolve` let pass comes here. The last
PLANS_KEPT plans are kept, each of at most MAX_PIECES_KEPT pieces (0.2 kB per piece, so 50 MB at the very most);
longer lists have several.
Threading: pure functions. Once its loop is compiled (transport/native.py), a plan is one foreign call outside the
interpreter's lock, and several threads can have pieces of it each (transport/shared_copies.py). Until then small
pieces are assigned between two views, under the lock, at a third of what a foreign call costs.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from transport.base import Blocks, Region
from transport.native import Table, compiled, table_of
from transport.regions import Span, bytes_of_each, known_ids, known_view
from transport.runs import runs

LARGEST_ASSIGNED_BYTES = 256 << 10
"""Some 50 us, for which no other thread of the process runs Python."""

LARGEST_PIECE_BYTES = 256 << 10
"""A run of blocks is several pieces then, so that several threads can have one each."""

MAX_PIECES_KEPT = 2048
PLANS_KEPT = 128
"""The hand-offs of one forward pass write by turns, layer by layer: as many as there may be."""


class CopyPlan:
    """What a list of block pairs copies, between regions of two shapes. pieces: from, to and bytes, counting from the
    first block's first byte of either side."""

    __slots__ = ("_extents", "_only", "_pieces", "_table", "num_bytes")

    def __init__(self, pieces: list[tuple[int, int, int]], source: _Side, target: _Side) -> None:
        self.num_bytes = sum(num_bytes for _, _, num_bytes in pieces)
        self._pieces = pieces
        self._extents = source.extent(), target.extent()
        self._table: Table | None = None
        self._only = _slices(pieces[0]) if len(pieces) == 1 and self.num_bytes <= LARGEST_ASSIGNED_BYTES else None

    @property
    def num_pieces(self) -> int:
        return len(self._pieces)

    def carry_out(self, from_address: int, to_address: int) -> None:
        """Copies between two regions of these shapes, from first block to first block."""
        if self._only is not None:
            from_slice, to_slice = self._only
            source, target = known_view(from_address, self._extents[0]), known_view(to_address, self._extents[1])
            target[to_slice] = source[from_slice]
        elif (loops := compiled()) is None:
            self._assign(from_address, to_address)
        elif self._pieces:
            loops.copy_pieces(self.table(), table_of([(from_address, to_address)]))

    def table(self) -> Table:
        """The pieces, at least one, as compiled code reads them."""
        if self._table is None:
            self._table = table_of(self._pieces)
        return self._table

    def _assign(self, from_address: int, to_address: int) -> None:
        source, target = known_view(from_address, self._extents[0]), known_view(to_address, self._extents[1])
        for from_at, to_at, num_bytes in self._pieces:
            if num_bytes <= LARGEST_ASSIGNED_BYTES:
                target[to_at : to_at + num_bytes] = source[from_at : from_at + num_bytes]
            else:
                ctypes.memmove(to_address + to_at, from_address + from_at, num_bytes)


def _slices(piece: tuple[int, int, int]) -> tuple[slice, slice]:
    from_at, to_at, num_bytes = piece
    return slice(from_at, from_at + num_bytes), slice(to_at, to_at + num_bytes)


def plans_of_blocks(source: Region, local: Blocks, target: Region, remote: Blocks) -> list[CopyPlan]:
    """What copies these blocks of one region to those of another, however many. None at all if they do not fit, which
    `resolve` and `check_pairing` explain."""
    sides, plans = (_Range.of(source, local), _Range.of(target, remote)), []
    for at in range(0, max(len(local.ids), len(remote.ids), 1), MAX_PIECES_KEPT):
        some = slice(at, at + MAX_PIECES_KEPT)
        plan = _known_fitting_plan(local.ids[some], remote.ids[some], *sides)
        if plan is None:
            return []
        plans.append(plan)
    return plans


def copy_pairs(source: Span, source_ids: Sequence[int], target: Span, target_ids: Sequence[int]) -> None:
    """Copies block by block, or run by run where both sides are dense and consecutive."""
    for plan in plans_of(source, source_ids, target, target_ids):
        plan.carry_out(source.address(0), target.address(0))


def plans_of(source: Span, source_ids: Sequence[int], target: Span, target_ids: Sequence[int]) -> Iterator[CopyPlan]:
    """Plans between the two spans' first blocks, for lists of any length."""
    if len(source_ids) != len(target_ids):
        raise ValueError(f"{len(source_ids)} pieces cannot be copied to {len(target_ids)} places")
    sides = [_Side(span.num_bytes, span.region.stride, span.region.num_blocks) for span in (source, target)]
    for at in range(0, len(source_ids), MAX_PIECES_KEPT):
        some = slice(at, at + MAX_PIECES_KEPT)
        yield _plan(tuple(source_ids[some]), tuple(target_ids[some]), *sides)


class _Side(NamedTuple):
    """What a plan must know of a region: bytes of a piece and from one to the next."""

    num_bytes: int
    stride: int
    num_blocks: int

    def extent(self) -> int:
        """From the first block's piece to the end of the last one's."""
        return (self.num_blocks - 1) * self.stride + self.num_bytes


class _Range(NamedTuple):
    """A region's shape, and a range of bytes inside each of its blocks, as they were asked for."""

    block_bytes: int
    stride: int
    num_blocks: int
    start: int
    num_bytes: int

    @classmethod
    def of(cls, region: Region, blocks: Blocks) -> _Range:
        return cls(region.block_bytes, region.stride, region.num_blocks, blocks.start, blocks.num_bytes)

    def side(self, ids: tuple[int, ...]) -> _Side | None:
        """None if some of it lies outside the region."""
        num_bytes = bytes_of_each(self.block_bytes, self.start, self.num_bytes)
        if num_bytes is None or not known_ids(ids).are_below(self.num_blocks):
            return None
        return _Side(num_bytes, self.stride, self.num_blocks)


@functools.lru_cache(maxsize=PLANS_KEPT)
def _known_fitting_plan(
    source_ids: tuple[int, ...], target_ids: tuple[int, ...], source: _Range, target: _Range
) -> CopyPlan | None:
    from_side, to_side = source.side(source_ids), target.side(target_ids)
    if from_side is None or to_side is None:
        return None
    if len(source_ids) != len(target_ids) or from_side.num_bytes != to_side.num_bytes:
        return None
    return _plan(source_ids, target_ids, from_side, to_side)


@functools.lru_cache(maxsize=PLANS_KEPT)
def _plan(source_ids: tuple[int, ...], target_ids: tuple[int, ...], source: _Side, target: _Side) -> CopyPlan:
    size, from_stride, to_stride = source.num_bytes, source.stride, target.stride
    if _may_have_runs(source_ids, target_ids, source, target):
        joined = _joined(source_ids, target_ids, max(LARGEST_PIECE_BYTES // size, 1))
        pieces = [(from_id * from_stride, to_id * to_stride, count * size) for from_id, to_id, count in joined]
    else:
        pairs = zip(source_ids, target_ids, strict=True)
        pieces = [(from_id * from_stride, to_id * to_stride, size) for from_id, to_id in pairs]
    return CopyPlan(pieces, source, target)


def _may_have_runs(source_ids: tuple[int, ...], target_ids: tuple[int, ...], source: _Side, target: _Side) -> bool:
    """Whether there may be blocks that one piece can hold: dense and consecutive on both sides."""
    is_dense = source.num_bytes == source.stride and target.num_bytes == target.stride
    return is_dense and known_ids(source_ids).may_have_run and known_ids(target_ids).may_have_run


def _joined(source_ids: tuple[int, ...], target_ids: tuple[int, ...], most: int) -> Iterator[tuple[int, int, int]]:
    """First blocks and number of blocks of each piece, no more than so many."""
    for from_id, to_id, count in runs(source_ids, target_ids):
        for at in range(0, count, most):
            yield from_id + at, to_id + at, min(most, count - at)
