"""What is known of every path to one receiver: measured, failed and until when, chosen.

Memory and threads: none of its own; the lock of `Connections` guards it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from core.handoff import Peer
from core.path import Path, PathState
from transport.base import Endpoint
from transport.choose import fastest
from transport.probe import Measurement


class Far(NamedTuple):
    """Who receives: one start of an instance, and one of its tensor-parallel ranks."""

    boot_id: str
    rank: int = 0


class Way(NamedTuple):
    """A path that is open."""

    far: Far
    scheme: str
    endpoint: Endpoint


@dataclass
class Known:
    """One path to one peer."""

    measurement: Measurement | None = None
    endpoint: Endpoint | None = None
    why_failed: str = ""
    retry_at_s: float = 0.0
    num_failures: int = 0
    num_lost_writes: int = 0


@dataclass
class PeerPaths:
    """Every path to one receiver, by scheme, best first as it was offered. expects_probes: it has a landing for them.
    used_s: when it was last sent to or measured."""

    peer: Peer
    rank: int
    offers: list[tuple[str, bytes]]
    by_scheme: dict[str, Known] = field(default_factory=dict)
    expects_probes: bool = False
    is_probed: bool = False
    used_s: float = 0.0

    def chosen(self, without: Sequence[str] = ()) -> str | None:
        """What a hand-off takes; None if everything is left out."""
        left = [scheme for scheme, _ in self.offers if scheme not in without]
        well = [scheme for scheme in left if not self.by_scheme[scheme].why_failed]
        if well:
            return fastest(well, self._measured())
        return min(left, key=lambda scheme: self.by_scheme[scheme].retry_at_s, default=None)

    def is_due(self, now_s: float) -> bool:
        """Whether measuring could change something."""
        failed = [known for known in self.by_scheme.values() if known.why_failed]
        return self.expects_probes and (not self.is_probed or any(now_s >= known.retry_at_s for known in failed))

    def _measured(self) -> dict[str, Measurement]:
        return {s: known.measurement for s, known in self.by_scheme.items() if known.measurement is not None}

    def show(self) -> list[Path]:
        """For people."""
        chosen = self.chosen()
        return [self._show(scheme, known, scheme == chosen) for scheme, known in self.by_scheme.items()]

    def _show(self, scheme: str, known: Known, is_chosen: bool) -> Path:
        state = PathState.CHOSEN if is_chosen else PathState.FAILED if known.why_failed else PathState.STANDBY
        speed = known.measurement
        if len(self.by_scheme) == 1:
            why = "the only one that both sides have"
        elif speed is None:
            why = "not measured yet"
        elif not speed.write_s:
            why = "moved nothing in the probe's time"
        else:
            why = "measured fastest, or as fast as the fastest" if is_chosen else "measured slower"
        return Path(
            peer=self.peer.name,
            boot_id=self.peer.boot_id,
            transport=scheme,
            state=state,
            write_gb_per_s=speed.write_gb_per_s if speed else 0.0,
            read_gb_per_s=speed.read_gb_per_s if speed else 0.0,
            latency_us=speed.latency_s * 1e6 if speed else 0.0,
            num_failures=known.num_failures,
            why=known.why_failed or why,
            receiver_rank=self.rank,
        )
