"""What the receiving scheduler tells its worker in one step, and what the worker answers."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from transport.messages import Part
from transport.runs import Lane


class Arm(msgspec.Struct, frozen=True):
    """These blocks may be written under this hand-off from now on. lanes: by whom, and which bytes of every block.
    audit: fill them with a pattern first, and count afterwards what was not written."""

    handoff: str
    request_id: str
    block_ids: list[int]
    audit: bool
    lanes: list[Lane]


class Check(msgspec.Struct, frozen=True):
    """The sender says that everything is in place: count it, compare digests, and say so. full_digest: every byte
    counts in them over any transport."""

    handoff: str
    parts: list[Part]
    full_digest: bool


class Drop(msgspec.Struct, frozen=True):
    """Give the hand-off up. fenced: the sender has promised that no write can follow. peer_dead: its scheduler's
    process has ended, so its worker is ending too."""

    handoff: str
    fenced: bool
    why: str
    peer_dead: bool = False


class LandCommands(msgspec.Struct):
    """One step's orders, in the order in which they must be obeyed."""

    arm: list[Arm] = []
    check: list[Check] = []
    drop: list[Drop] = []


class Received(msgspec.Struct, frozen=True):
    """Complete and equal on one rank, or, from `together` on, on all. num_pairs: (layer, block) pairs counted there;
    unwritten: pairs where the audit's pattern was still found."""

    handoff: str
    request_id: str
    num_pairs: int
    num_bytes: int
    check_s: float
    audited: int
    unwritten: int
    rank: int = 0


class Lost(msgspec.Struct, frozen=True):
    """Not received, and no write can follow on this rank."""

    handoff: str
    request_id: str
    why: str
    rank: int = 0


class LandResults(msgspec.Struct):
    """One step's answer, of one rank or of all. armed: (hand-off, rank)."""

    armed: list[tuple[str, int]] = []
    received: list[Received] = []
    lost: list[Lost] = []

    def ended(self) -> list[Received | Lost]:
        """Hand-offs that have ended, in one way or the other."""
        return [*self.received, *self.lost]

    def with_those_of(self, other: LandResults) -> LandResults:
        """Of both."""
        return LandResults(self.armed + other.armed, self.received + other.received, self.lost + other.lost)


def together(ended: Sequence[Received | Lost]) -> Received | Lost:
    """How a hand-off has ended that has ended on every rank: received only if it was on each."""
    lost = [each for each in ended if isinstance(each, Lost)]
    if lost:
        return lost[0]
    received = [each for each in ended if isinstance(each, Received)]
    return msgspec.structs.replace(
        received[0],
        num_pairs=min(each.num_pairs for each in received),
        num_bytes=sum(each.num_bytes for each in received),
        check_s=max(each.check_s for each in received),
        audited=sum(each.audited for each in received),
        unwritten=sum(each.unwritten for each in received),
    )
