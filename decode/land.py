"""What the receiving scheduler tells its worker in one step, and what the worker answers."""

from __future__ import annotations

import msgspec


class Arm(msgspec.Struct, frozen=True):
    """These blocks may be written under this hand-off from now on. audit: fill them with a pattern first, and count
    afterwards what was not written."""

    handoff: str
    request_id: str
    block_ids: list[int]
    audit: bool


class Check(msgspec.Struct, frozen=True):
    """The sender says that everything is in place: count it, compare digests, and say so."""

    handoff: str
    num_pairs: int
    digest: int
    scheme: str
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
    """Complete and equal. num_pairs: (layer, block) pairs counted here; unwritten: pairs where the audit's pattern
    was still found."""

    handoff: str
    request_id: str
    num_pairs: int
    num_bytes: int
    check_s: float
    audited: int
    unwritten: int


class Lost(msgspec.Struct, frozen=True):
    """Not received, and no write can follow."""

    handoff: str
    request_id: str
    why: str


class LandResults(msgspec.Struct):
    """One step's answer."""

    armed: list[str] = []
    received: list[Received] = []
    lost: list[Lost] = []
