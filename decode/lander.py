"""The receiving worker: opens landings, counts what arrived, compares digests, and keeps the fence.

A hand-off counts as received only when the scheduler has the sender's Landed *and* this worker has seen the notice
behind the last write, counted every (layer, block) pair where the transport can count, and found the sender's digest
in its own memory. A hand-off that is given up is reported lost only when no write can follow any more: the sender
said so, its connection ended, or the landing itself refuses.

Memory and threads: the engine's worker thread only. The transports' threads write into the blocks by themselves.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from core.clock import Clock
from core.errors import TransferError
from decode.land import Arm, Check, Drop, LandCommands, LandResults, Lost, Received
from transport.base import Blocks, Landing, Region, Transport
from transport.digest import BlockSum, HostSum, is_full
from transport.faultpoint import FaultPoint
from transport.messages import Part
from transport.regions import part_of
from transport.runs import Lane

AUDIT_BYTE = 0xFF
"""Every float type of the cache reads this pattern as NaN."""

DEAD_PEER_GRACE_S = 1.0
"""A worker process outlives its dead scheduler by less than this (the kernel ends it with its parent)."""

NOTICE_TIMEOUT_S = 5.0
"""How long Landed may be ahead of the notice behind the data, which travels on another socket."""


@dataclass
class _Source:
    """One sending rank: a landing per transport that was offered, and what that rank says that it wrote."""

    lane: Lane
    landings: dict[str, Landing]
    part: Part | None = None
    has_notice: bool = False
    digest: BlockSum | None = None

    def why_unknown(self) -> str:
        """Why its word cannot be checked; empty if it can."""
        if self.part is None:
            return f"rank {self.lane.sender} of the sender does not say what it wrote"
        return "" if self.part.scheme in self.landings else f"unknown transport {self.part.scheme!r}"


@dataclass
class _Landing:
    """One hand-off that is being received."""

    arm: Arm
    sources: list[_Source]
    check: Check | None = None
    check_since_s: float = 0.0
    compared_since_s: float | None = None
    drop: Drop | None = None
    drop_since_s: float = 0.0
    fenced: bool = False

    def all(self) -> Iterator[Landing]:
        """Of every sending rank and transport."""
        return (landing for source in self.sources for landing in source.landings.values())


class Lander:
    """Receives every hand-off of this worker, which is one tensor-parallel rank. `regions` are its KV cache, one per
    layer in layer order."""

    def __init__(
        self,
        transports: Mapping[str, Transport],
        regions: Sequence[Region],
        clock: Clock,
        faults: FaultPoint,
        rank: int = 0,
        begin_sum: Callable[[], BlockSum] = HostSum,
    ) -> None:
        self._rank = rank
        self._begin_sum = begin_sum
        self._transports = transports
        self._regions = regions
        self._clock = clock
        self._faults = faults
        self._open: dict[str, _Landing] = {}
        self._results = LandResults()

    def begin_step(self, commands: LandCommands) -> None:
        """Takes one step's orders, before its forward pass."""
        for arm in commands.arm:
            self._arm(arm)
        for check in commands.check:
            landing = self._open.get(check.handoff)
            if landing is not None:
                landing.check, landing.check_since_s = check, self._clock.monotonic_s()
                for source in landing.sources:
                    pair = source.lane.sender, self._rank
                    source.part = next((part for part in check.parts if (part.sender, part.receiver) == pair), None)
        for drop in commands.drop:
            landing = self._open.get(drop.handoff)
            if landing is not None:
                if landing.drop is None or drop.peer_dead:
                    landing.drop, landing.drop_since_s = drop, self._clock.monotonic_s()
                landing.fenced = landing.fenced or drop.fenced

    def end_step(self) -> LandResults:
        """What is received or lost since the last step."""
        for handoff, landing in list(self._open.items()):
            if self._settle(landing):
                del self._open[handoff]
        results, self._results = self._results, LandResults()
        return results

    def num_waiting(self) -> int:
        """Hand-offs whose end depends on something that comes without a message: the engine should come back."""
        return sum(1 for landing in self._open.values() if landing.check or landing.drop)

    def _arm(self, arm: Arm) -> None:
        if arm.audit:
            self._fill(arm.block_ids)
        sources = [self._expect(arm, lane) for lane in arm.lanes if lane.receiver == self._rank]
        self._open[arm.handoff] = _Landing(arm, sources)
        self._results.armed.append((arm.handoff, self._rank))

    def _expect(self, arm: Arm, lane: Lane) -> _Source:
        ids, tag = tuple(arm.block_ids), lane.tag(arm.handoff)
        blocks = [Blocks(region.id, ids, lane.receiver_start, lane.num_bytes) for region in self._regions]
        return _Source(lane, {scheme: transport.expect(tag, blocks) for scheme, transport in self._transports.items()})

    def _settle(self, landing: _Landing) -> bool:
        """Whether the hand-off has ended."""
        if landing.drop is not None:
            return self._settle_dropped(landing, landing.drop)
        if landing.check is None:
            return False
        check, is_overdue = landing.check, self._clock.monotonic_s() - landing.check_since_s > NOTICE_TIMEOUT_S
        for source in landing.sources:
            if why := source.why_unknown():
                return self._lose(landing, why)
        if not all(self._has_notice(source, check) for source in landing.sources):
            return self._lose(landing, "the notice behind the data did not come") if is_overdue else False
        if landing.compared_since_s is None:
            landing.compared_since_s = self._clock.monotonic_s()
        for source in landing.sources:
            difference = self._compare(landing, source, check)
            if difference is None:
                return False
            if difference:
                return self._lose(landing, difference)
        self._receive(landing, self._clock.monotonic_s() - landing.compared_since_s)
        return True

    def _has_notice(self, source: _Source, check: Check) -> bool:
        assert source.part is not None
        notices = source.landings[source.part.scheme].poll()
        source.has_notice = source.has_notice or check.handoff.encode() in notices
        return source.has_notice

    def _settle_dropped(self, landing: _Landing, drop: Drop) -> bool:
        if landing.fenced or all(self._is_fenced(landing, each) for each in landing.all()):
            self._close(landing)  # what a failed path has sent may still arrive: refused where it can be
            self._results.lost.append(Lost(landing.arm.handoff, landing.arm.request_id, drop.why, self._rank))
            return True
        return False

    def _is_fenced(self, landing: _Landing, source: Landing) -> bool:
        """Whether no write can follow through this landing.

        A broken control connection is no proof that a known writer is gone: only the end of its own connection is. A
        sender that had not begun when its scheduler died gets the grace in which its worker dies too.
        """
        if source.close() or source.peer_gone():
            return True
        if landing.drop is None or not landing.drop.peer_dead or source.has_writer():
            return False
        return self._clock.monotonic_s() - landing.drop_since_s > DEAD_PEER_GRACE_S

    def _compare(self, landing: _Landing, source: _Source, check: Check) -> str | None:
        """Why what arrived from one rank is not what was sent; empty if it is, None if that is not known yet."""
        part, block_ids = source.part, landing.arm.block_ids
        assert part is not None
        expected = len(block_ids) * len(self._regions)
        if part.num_pairs != expected:
            return f"sent {part.num_pairs} of {expected} blocks"
        arrived = source.landings[part.scheme]
        written = arrived.num_written()
        if written is not None and written != expected:
            return f"received {written} of {expected} blocks"
        full = is_full(part.scheme, check.full_digest)
        digest = arrived.digest() if full else None
        if digest is None:
            try:
                digest = self._digest(source, block_ids, full=full)
            except TransferError as error:
                return str(error)
            if digest is None:
                return None
        return "" if digest == part.digest else "digest differs: a block is torn, misplaced or flipped"

    def _digest(self, source: _Source, block_ids: list[int], *, full: bool) -> int | None:
        """Of what lies in our own blocks; None while a device adds it up."""
        if source.digest is None:
            source.digest = self._begin_sum()
            for region in self._regions:
                part = part_of(region, source.lane.receiver_start, source.lane.num_bytes)
                source.digest.add(part, block_ids, 0, full=full)
        return source.digest.value()

    def _receive(self, landing: _Landing, check_s: float) -> None:
        block_ids = landing.arm.block_ids
        pairs = len(block_ids) * len(self._regions)
        audited, unwritten = self._audit(block_ids) if landing.arm.audit else (0, 0)
        self._results.received.append(
            Received(
                handoff=landing.arm.handoff,
                request_id=landing.arm.request_id,
                num_pairs=pairs,
                num_bytes=len(block_ids) * sum(region.block_bytes for region in self._regions),
                check_s=check_s,
                audited=audited,
                unwritten=unwritten,
                rank=self._rank,
            )
        )
        self._close(landing)

    def _lose(self, landing: _Landing, why: str) -> bool:
        """Landed has come, so the sender has finished writing: no fence is missing."""
        self._close(landing)
        self._results.lost.append(Lost(landing.arm.handoff, landing.arm.request_id, why, self._rank))
        return True

    def _close(self, landing: _Landing) -> None:
        for each in landing.all():
            each.close()
        for source in landing.sources:
            if source.digest is not None:
                source.digest.release()

    def _fill(self, block_ids: list[int]) -> None:
        for region in self._regions:
            for block_id in block_ids:
                ctypes.memset(region.address + block_id * region.stride, AUDIT_BYTE, region.block_bytes)

    def _audit(self, block_ids: list[int]) -> tuple[int, int]:
        """(pairs looked at, pairs that still hold a cache line of the pattern)."""
        line = bytes([AUDIT_BYTE]) * 64
        pairs = [(region, block_id) for region in self._regions for block_id in block_ids]
        unwritten = sum(
            line in ctypes.string_at(region.address + block_id * region.stride, region.block_bytes)
            for region, block_id in pairs
        )
        return len(pairs), unwritten
