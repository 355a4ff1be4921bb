"""Joins what a waiting request gets from several sources: it has arrived when each of them has ended.

    Arm (from P) ──┐
                   ├──▶ one `Arrived` per request, lost if any part is lost
    Load (cache) ──┘

vLLM wants each waiting request reported exactly once, and not before the last writer has let go of its blocks.
Threads: the engine's worker thread only.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import msgspec

from kvcache.orders import Loaded


class Part(enum.Enum):
    """Where blocks of one request come from."""

    PEER = "peer"
    CACHE = "cache"


class Arrived(msgspec.Struct, frozen=True):
    """One request's blocks are in place, or lost and nobody writes them any more. loaded: what the cache gave."""

    request_id: str
    why_lost: str = ""
    loaded: Loaded | None = None

    @property
    def in_step(self) -> bool:
        """Whether the step that is over has computed with them already; then vLLM does not wait for the request."""
        return self.loaded is not None and self.loaded.in_step

    def with_that_of(self, other: Arrived) -> Arrived:
        """The same request on two tensor-parallel ranks."""
        loaded = self.loaded or other.loaded
        if self.loaded is not None and other.loaded is not None:
            loaded = self.loaded.with_that_of(other.loaded)
        return Arrived(self.request_id, self.why_lost or other.why_lost, loaded)


@dataclass
class _Parts:
    waiting: set[Part] = field(default_factory=set)
    why_lost: str = ""
    loaded: Loaded | None = None


class Arrivals:
    """The requests of one worker that wait for blocks from outside."""

    def __init__(self) -> None:
        self._all: dict[str, _Parts] = {}
        self._arrived: list[Arrived] = []

    def expect(self, request_id: str, part: Part) -> None:
        """Another source of a request; all are named before the first ends."""
        self._all.setdefault(request_id, _Parts()).waiting.add(part)

    def end(self, request_id: str, part: Part, why_lost: str = "", loaded: Loaded | None = None) -> None:
        """One source has ended."""
        parts = self._all.get(request_id)
        if parts is None:
            return
        parts.waiting.discard(part)
        parts.why_lost = parts.why_lost or why_lost
        parts.loaded = loaded or parts.loaded
        if not parts.waiting:
            del self._all[request_id]
            self._arrived.append(Arrived(request_id, parts.why_lost, parts.loaded))

    def take(self) -> list[Arrived]:
        """Who has arrived since the last call."""
        arrived, self._arrived = self._arrived, []
        return arrived
