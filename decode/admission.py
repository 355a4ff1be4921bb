"""Why the fallback must not become the fault: what a decode instance may promise, and what it may recompute.

Blocks reserved for a hand-off cannot be preempted while it is under way; running requests are preempted instead. So a
hand-off is accepted only while reserved-but-not-landed blocks stay under a share of the pool, and while enough free
blocks remain for the requests that run already. Every hand-off that fails is computed here; those are bounded too,
the rest wait without blocks.
"""

from __future__ import annotations

import msgspec


class Capacity(msgspec.Struct, frozen=True):
    """The engine's pool now. growth_blocks: what its running requests may still need."""

    num_blocks: int
    free_blocks: int
    growth_blocks: int


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """reserved_share: of the pool, for hand-offs that have not landed. recomputes: failed hand-offs computed at once.
    min_tokens: hand-offs of fewer missing tokens are not worth a message; 0 means one block."""

    reserved_share: float = 0.5
    recomputes: int = 2
    min_tokens: int = 0


def fits(capacity: Capacity, limits: Limits, reserved_blocks: int, needed_blocks: int) -> bool:
    """Whether a hand-off that needs `needed_blocks` may be accepted beside `reserved_blocks` others.

    One that alone exceeds the share is accepted when nothing else is reserved, or it would wait for ever.
    """
    within_share = reserved_blocks + needed_blocks <= capacity.num_blocks * limits.reserved_share
    if not within_share and reserved_blocks > 0:
        return False
    is_idle = reserved_blocks == 0 and capacity.growth_blocks == 0
    return is_idle or needed_blocks + capacity.growth_blocks <= capacity.free_blocks


class RecomputeBudget:
    """Which failed hand-offs are being computed here now: at most `most`, the rest wait without blocks."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._computing: set[str] = set()

    def take(self, request_id: str) -> bool:
        """Whether the engine may compute this request now. A request that holds a place keeps it."""
        if request_id not in self._computing and len(self._computing) >= self._most:
            return False
        self._computing.add(request_id)
        return True

    def give_back(self, request_id: str) -> None:
        """Its prompt is computed, or it has ended. May be called for one that holds no place."""
        self._computing.discard(request_id)
