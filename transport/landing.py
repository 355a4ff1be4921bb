"""The receiving end of transports that see what arrives: which blocks may be written, which are, and their digest.

    Inbox (one per transport)         tag ──▶ CountedLanding: expected (region, block) pairs, what arrived, notices
       └─ lock, closed tags

Memory model: the blocks belong to the engine; a landing only holds their numbers. A pair's digest summand is taken
from memory right after its bytes are in place, and a rewritten pair replaces its summand.
Threading: the inbox's one lock is held by whoever copies bytes into a landing's blocks (a frame at a time, at most
1 MiB) and by every method here, so after `close` returned nothing writes under the tag any more. Where a library writes
into the blocks by itself (RDMA), its receives are held (`hold`, `release`), and `close` is True only once none is.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Mapping, Sequence

from core.errors import TransferError
from transport.base import Blocks, Region
from transport.digest import bytes_digest
from transport.regions import Span, known_view, resolve

MAX_CLOSED_TAGS = 4096
MAX_PIECES_PER_BLOCK = 1024
MAX_NOTICES = 1024
CLOSE_WAIT_S = 0.25
"""How long `close` waits for receives under way: a frame takes milliseconds, unless its sender has stopped."""

_MASK = (1 << 64) - 1


class Pieces:
    """Which bytes of one block have arrived: disjoint, sorted ranges."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []

    def add(self, start: int, end: int) -> None:
        """Joins the range with those it touches."""
        apart = []
        for first, last in self._ranges:
            if last < start or first > end:
                apart.append((first, last))
            else:
                start, end = min(start, first), max(end, last)
        self._ranges = sorted([*apart, (start, end)])

    def covers(self, start: int, end: int) -> bool:
        """Whether every byte from `start` to `end` has arrived."""
        return any(first <= start and end <= last for first, last in self._ranges)

    def __len__(self) -> int:
        return len(self._ranges)


class CountedLanding:
    """A `transport.base.Landing` that counts. Made by `Inbox.open`. spans: the part of each region's blocks that is
    expected. is_digested: False where blocks lie in a GPU's memory, which this process does not read."""

    def __init__(
        self,
        inbox: Inbox,
        tag: str,
        positions: dict[int, dict[int, int]],
        spans: Mapping[int, Span],
        is_digested: bool = True,
    ) -> None:
        self._inbox = inbox
        self._tag = tag
        self._positions = positions
        self._spans = spans
        self._pieces: dict[tuple[int, int], Pieces] = {}
        self._summands: dict[int, dict[int, int]] = {region_id: {} for region_id in positions}
        self._num_written = 0
        self._sum: int | None = 0 if is_digested else None
        self._notices: collections.deque[bytes] = collections.deque()
        self._num_held = 0

    def poll(self) -> list[bytes]:
        with self._inbox.lock:
            notices = list(self._notices)
            self._notices.clear()
        return notices

    def num_written(self) -> int | None:
        with self._inbox.lock:
            return self._num_written

    def digest(self) -> int | None:
        with self._inbox.lock:
            return self._sum

    def peer_gone(self) -> bool:
        return False

    def has_writer(self) -> bool:
        with self._inbox.lock:
            return bool(self._num_written or self._pieces)

    def close(self) -> bool:
        self._inbox.shut(self._tag, self)
        with self._inbox.lock:
            return self._inbox.released.wait_for(lambda: not self._num_held, CLOSE_WAIT_S)

    def hold(self) -> None:
        """A receive into its blocks has begun. Under the inbox's lock."""
        self._num_held += 1

    def release(self) -> None:
        """One has ended: nothing more will be written by it. Under the inbox's lock."""
        self._num_held -= 1
        self._inbox.released.notify_all()

    def refusal(self, region_id: int, block_ids: Sequence[int], written: Span | None = None) -> str:
        """Why these blocks, or the part of them that `written` names, may not be written; empty if they may. Under the
        inbox's lock."""
        expected = self._positions.get(region_id)
        if expected is None:
            return f"region {region_id} is not expected under this tag"
        if written is not None and not _lies_in(written, self._spans[region_id]):
            return f"bytes {written.start}+{written.num_bytes} of region {region_id} are not expected under this tag"
        unexpected = next((block_id for block_id in block_ids if block_id not in expected), None)
        if unexpected is not None:
            return f"block {unexpected} of region {region_id} is not expected under this tag"
        for block_id in block_ids if self._pieces else ():
            if len(self._pieces.get((region_id, block_id), ())) >= MAX_PIECES_PER_BLOCK:
                return f"block {block_id} of region {region_id} comes in too many pieces"
        return ""

    def record(self, span: Span, block_ids: Sequence[int]) -> None:
        """Counts bytes that are in place now. Under the inbox's lock."""
        region, expected = span.region, self._spans[span.region.id]
        is_whole = _lies_in(expected, span)
        complete = block_ids if is_whole else [each for each in block_ids if self._is_complete(span, each)]
        known = self._summands[region.id]
        self._num_written -= len(known)
        if self._sum is None:
            known.update(dict.fromkeys(complete, 0))
        else:
            self._sum = (self._sum + self._change(region, complete, known)) & _MASK
        self._num_written += len(known)
        if self._pieces:
            for block_id in complete:
                self._pieces.pop((region.id, block_id), None)

    def _change(self, region: Region, complete: Sequence[int], known: dict[int, int]) -> int:
        """By how much these blocks change the sum. known: summands by block, brought up to date."""
        change, expected = 0, self._spans[region.id]
        memory = known_view(region.address, (region.num_blocks - 1) * region.stride + region.block_bytes)
        positions, stride, size = self._positions[region.id], region.stride, expected.num_bytes
        for block_id in complete:
            at = block_id * stride + expected.start
            summand = bytes_digest(memory[at : at + size], region.id, positions[block_id])
            if block_id in known:
                change -= known[block_id]
            known[block_id] = summand
            change += summand
        return change

    def _is_complete(self, span: Span, block_id: int) -> bool:
        """Adds a part of a block; whether all its expected parts are there now."""
        pair, expected = (span.region.id, block_id), self._spans[span.region.id]
        if block_id in self._summands[span.region.id]:
            return True
        pieces = self._pieces.setdefault(pair, Pieces())
        pieces.add(span.start, span.start + span.num_bytes)
        return pieces.covers(expected.start, expected.start + expected.num_bytes)

    def notify(self, notice: bytes) -> bool:
        """Keeps a notice for `poll`; False if too many wait already. Under the inbox's lock."""
        if len(self._notices) >= MAX_NOTICES:
            return False
        self._notices.append(notice)
        return True


class Inbox:
    """Every open landing of one transport."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.released = threading.Condition(self.lock)
        self._open: dict[str, CountedLanding] = {}
        self._closed: collections.OrderedDict[str, None] = collections.OrderedDict()

    def open(self, tag: str, blocks: Sequence[Blocks], regions: Mapping[int, Region]) -> CountedLanding:
        """Raises TransferError if the tag is open already or a block is named twice or does not exist."""
        positions = expected_positions(blocks, regions)
        spans = {each.region: resolve(regions, each, "own") for each in blocks}
        with self.lock:
            if tag in self._open:
                raise TransferError(f"a landing is open already under tag {tag!r}")
            self._closed.pop(tag, None)
            is_digested = all(regions[region_id].device is None for region_id in positions)
            landing = CountedLanding(self, tag, positions, spans, is_digested)
            self._open[tag] = landing
        return landing

    def find(self, tag: str) -> CountedLanding | None:
        """The open landing of a tag."""
        return self._open.get(tag)

    def was_closed(self, tag: str) -> bool:
        """Whether a landing of this tag was closed lately."""
        return tag in self._closed

    def shut(self, tag: str, landing: CountedLanding) -> None:
        """From now on nothing is accepted under the tag, unless another landing has been opened since."""
        with self.lock:
            if self._open.get(tag) is not landing:
                return
            del self._open[tag]
            self._closed[tag] = None
            while len(self._closed) > MAX_CLOSED_TAGS:
                self._closed.popitem(last=False)


def _lies_in(part: Span, whole: Span) -> bool:
    return whole.start <= part.start and part.start + part.num_bytes <= whole.start + whole.num_bytes


def expected_positions(blocks: Sequence[Blocks], regions: Mapping[int, Region]) -> dict[int, dict[int, int]]:
    """Position by block id by region. Raises TransferError for a block that is named twice or does not exist."""
    positions: dict[int, dict[int, int]] = {}
    by_ids: dict[tuple[int, ...], dict[int, int]] = {}  # one entry where all regions share their ids
    for each in blocks:
        resolve(regions, each, "own")
        if each.ids not in by_ids:
            by_ids[each.ids] = {block_id: index for index, block_id in enumerate(each.ids)}
        if each.region in positions or len(by_ids[each.ids]) != len(each.ids):
            raise TransferError(f"region {each.region} or one of its blocks is named twice")
        positions[each.region] = by_ids[each.ids]
    return positions
