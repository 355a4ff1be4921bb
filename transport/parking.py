"""Frames that came before their tag was expected, kept for a while, bounded in all.

Memory model: what is kept is counted by its `cost_bytes`; the payloads lie where their transport keeps them.
Threading: the I/O thread alone.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

MAX_PARKED_BYTES = 64 << 20
MAX_PARKED_FRAMES = 8192
PARKING_TIMEOUT_S = 2.0


class Parked(Protocol):
    """What can be kept. until_s: when it is given up."""

    @property
    def tag(self) -> str: ...

    @property
    def until_s(self) -> float: ...

    def cost(self) -> int: ...


P = TypeVar("P", bound=Parked)


class Parking(Generic[P]):
    """Frames by tag."""

    def __init__(self) -> None:
        self.by_tag: dict[str, list[P]] = {}
        self._num_bytes = 0
        self._num_frames = 0

    def add(self, parked: P) -> bool:
        """False if there is no room."""
        if self._num_bytes + parked.cost() > MAX_PARKED_BYTES or self._num_frames >= MAX_PARKED_FRAMES:
            return False
        self.by_tag.setdefault(parked.tag, []).append(parked)
        self._num_bytes += parked.cost()
        self._num_frames += 1
        return True

    def take(self, tag: str) -> list[P]:
        """Everything of one tag, in order."""
        frames = self.by_tag.pop(tag)
        self._num_bytes -= sum(parked.cost() for parked in frames)
        self._num_frames -= len(frames)
        return frames
