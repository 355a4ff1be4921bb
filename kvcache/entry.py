"""One block's bytes in an arena, and where they stand between reservation and eviction."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from kvcache.keys import BlockKey


class State(enum.Enum):
    """Of one block's bytes."""

    RESERVED = "reserved"
    READY = "ready"
    COOLING = "cooling"


@dataclass(slots=True)
class Entry:
    """One block's bytes. `deadline_s`: of the reservation, or the end of cooling. `is_below`: a tier below the arena
    has it, or is about to get it. `before`: of a partial block, the key of the block that it follows; not known any
    more after a take-over. `lossy`: the codec that has rounded the block, empty for one that is exact."""

    key: BlockKey
    offset: int
    num_bytes: int
    owner: int
    state: State
    deadline_s: float
    digest: int = 0
    pins: int = 0
    before: BlockKey = b""
    tenant: bytes = b""
    is_below: bool = False
    lossy: str = ""

    @property
    def tier(self) -> str:
        """Where a reader has it from, as its request's record says it."""
        return f"host-{self.lossy}" if self.lossy else "host"
