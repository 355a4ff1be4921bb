"""Pins of searches: what one found keeps its bytes until it is released, its deadline passes or its owner is gone.

Threading: the server's event loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.clock import Clock
from kvcache.entry import Entry

LEASE_S = 30.0
"""How long a reader may take from the answer to the end of its copy."""


@dataclass
class Lease:
    """What one search pinned."""

    entries: Sequence[Entry]
    deadline_s: float


class Leases:
    """Of all owners, by owner and the owner's own number."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._all: dict[tuple[int, int], Lease] = {}

    def pin(self, owner: int, lease: int, entries: Sequence[Entry]) -> None:
        """Pins these blocks; what was pinned under the same number is not any more."""
        self.release(owner, lease)
        if entries:
            for entry in entries:
                entry.pins += 1
            self._all[owner, lease] = Lease(entries, self._clock.monotonic_s() + LEASE_S)

    def release(self, owner: int, lease: int) -> None:
        """Ends the pins of one search; one that is not known (any more) is passed over."""
        held = self._all.pop((owner, lease), None)
        for entry in held.entries if held else ():
            entry.pins -= 1

    def release_owner(self, owner: int) -> None:
        """Ends all pins of one owner."""
        for name in [name for name in self._all if name[0] == owner]:
            self.release(*name)

    def expire(self) -> int:
        """Ends those that are past their deadline; how many there were."""
        now_s = self._clock.monotonic_s()
        over = [name for name, lease in self._all.items() if now_s > lease.deadline_s]
        for name in over:
            self.release(*name)
        return len(over)
