"""What an arena's index has counted: blocks since the server started, bytes by state, and why blocks have left."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Reason(enum.Enum):
    """Why a complete block has left the arena: its room was needed, its tenant has too much, nobody has used it, its
    label has ended, or somebody asked for it."""

    SPACE = "space"
    QUOTA = "quota"
    TTL = "ttl"
    LABEL = "label"
    DROP = "drop"


@dataclass
class Counts:
    """Since the server started, in blocks. evicted: for any reason but a drop; unwritten: evicted ones that no tier
    below has."""

    searched: int = 0
    found: int = 0
    committed: int = 0
    evicted: int = 0
    unwritten: int = 0
    refused: int = 0
    quarantined: int = 0
    expired: int = 0
    taken_over: int = 0


@dataclass
class Usage:
    """Bytes by state; pinned: those of `ready` that labels keep."""

    reserved: int = 0
    ready: int = 0
    cooling: int = 0
    pinned: int = 0
