"""The ways from this worker to every peer it sends to: endpoints, what was measured, what has failed, what is taken.

    pick ──▶ chosen by measurement, or the first that was offered ──▶ fails ──▶ next best until a probe succeeds again

A peer is a boot id: one that restarts is another peer, and is measured anew. It is measured when it has said that it
expects that (`greet`); a hand-off that comes before takes the first path that was offered. A peer that no path reaches
is forgotten after a while.

Memory and threads: the engine's thread picks and reports failures, the prober's thread measures; one lock guards the
tables and is never held while something is waited for.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from core.clock import Clock
from core.errors import TransferError
from core.handoff import Peer
from core.path import Path, PathState
from transport.base import Endpoint, Transport
from transport.choose import candidates, fastest
from transport.probe import Measurement

BACKOFF_S = 10.0
LONGEST_BACKOFF_S = 300.0
FORGET_AFTER_S = 60.0
MAX_LOST_WRITES = 3
"""Hand-offs whose writes fail one after the other, on an endpoint that says nothing, until the path counts as failed.
One can fail without the path's fault: its receiver has given it up."""


class Way(NamedTuple):
    """A path that is open."""

    scheme: str
    endpoint: Endpoint


@dataclass
class _Known:
    """One path to one peer."""

    measurement: Measurement | None = None
    endpoint: Endpoint | None = None
    why_failed: str = ""
    retry_at_s: float = 0.0
    num_failures: int = 0
    num_lost_writes: int = 0


@dataclass
class _PeerPaths:
    """Every path to one peer, by scheme, best first as it was offered."""

    peer: Peer
    offers: list[tuple[str, bytes]]
    by_scheme: dict[str, _Known] = field(default_factory=dict)
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

    def _show(self, scheme: str, known: _Known, is_chosen: bool) -> Path:
        state = PathState.CHOSEN if is_chosen else PathState.FAILED if known.why_failed else PathState.STANDBY
        rank, speed = ("", known.measurement)
        if len(self.by_scheme) == 1:
            rank = "the only one that both sides have"
        elif speed is None:
            rank = "not measured yet"
        elif is_chosen:
            rank = "measured fastest, or as fast as the fastest"
        if speed is not None and not speed.is_complete:
            rank = f"{rank}; did not end in the probe's time".removeprefix("; ")
        return Path(
            peer=self.peer.name,
            boot_id=self.peer.boot_id,
            transport=scheme,
            state=state,
            write_gb_per_s=speed.write_gb_per_s if speed else 0.0,
            read_gb_per_s=speed.read_gb_per_s if speed else 0.0,
            latency_us=speed.latency_s * 1e6 if speed else 0.0,
            num_failures=known.num_failures,
            why=known.why_failed or rank,
        )


class Connections:
    """All ways of one worker."""

    def __init__(self, transports: Mapping[str, Transport], clock: Clock) -> None:
        self._transports = transports
        self._clock = clock
        self._lock = threading.RLock()
        self._peers: dict[str, _PeerPaths] = {}
        self._version = 0

    # ---- the engine's thread ----

    def pick(self, peer: Peer, offers: Sequence[tuple[str, bytes]], without: Sequence[str] = ()) -> Way:
        """The way that a hand-off takes now. Raises TransferError if no transport joins both sides, or all that do are
        left out."""
        with self._lock:
            paths = self._meet(peer, offers)
            paths.used_s = self._clock.monotonic_s()
            scheme = paths.chosen(without)
            if scheme is None:
                raise TransferError(f"every transport to {peer.name} has failed: {', '.join(without)}")
            return Way(scheme, self._open(paths, scheme))

    def lost_write(self, boot_id: str, way: Way, why: str) -> bool:
        """A hand-off's write over this way has failed. True: so has the path, and the next best is taken."""
        with self._lock:
            known = self._find(boot_id, way.scheme)
            if known is None or known.endpoint is not way.endpoint:
                return True  # another hand-off has noticed before
            known.num_lost_writes += 1
            if not way.endpoint.failure() and known.num_lost_writes < MAX_LOST_WRITES:
                return False
            self._mark(known, why)
            return True

    def wrote(self, boot_id: str, scheme: str) -> None:
        """A hand-off was written completely."""
        with self._lock:
            known = self._find(boot_id, scheme)
            if known is not None:
                known.num_lost_writes = 0
                self._version += bool(known.why_failed)
                known.why_failed = ""

    def forget(self, boot_id: str) -> None:
        """The peer is dead: nothing of ours touches its memory after this."""
        with self._lock:
            paths = self._peers.pop(boot_id, None)
            if paths is not None:
                self._version += 1
                for known in paths.by_scheme.values():
                    _close(known)

    def close(self) -> None:
        """Closes every endpoint: after this, nothing of this worker writes anywhere."""
        with self._lock:
            for boot_id in list(self._peers):
                self.forget(boot_id)

    def num_endpoints(self) -> int:
        """Paths that are open."""
        with self._lock:
            return sum(
                known.endpoint is not None for paths in self._peers.values() for known in paths.by_scheme.values()
            )

    # ---- the prober's thread ----

    def greet(self, peer: Peer, offers: Sequence[tuple[str, bytes]]) -> None:
        """A peer expects to be measured. Raises TransferError if no transport joins both sides."""
        with self._lock:
            self._meet(peer, offers).expects_probes = True

    def due(self) -> list[Peer]:
        """Peers that should be measured now: new ones, and those with a failed path whose time is up."""
        with self._lock:
            now_s = self._clock.monotonic_s()
            return [paths.peer for paths in self._peers.values() if paths.is_due(now_s)]

    def open_all(self, boot_id: str) -> list[Way]:
        """Opens every path to a peer."""
        with self._lock:
            paths, ways = self._peers.get(boot_id), []
            for scheme, _ in paths.offers if paths is not None else ():
                assert paths is not None
                try:
                    ways.append(Way(scheme, self._open(paths, scheme)))
                except TransferError as error:
                    self._mark(paths.by_scheme[scheme], str(error))
            return ways

    def measured(self, boot_id: str, scheme: str, measurement: Measurement | None) -> None:
        """A path works; None: it was not measured, for lack of another to compare it with."""
        with self._lock:
            known = self._find(boot_id, scheme)
            if known is not None:
                known.measurement, known.why_failed, known.num_lost_writes = measurement, "", 0
                self._version += 1

    def unreachable(self, boot_id: str, scheme: str, why: str) -> None:
        """A path does not work."""
        with self._lock:
            known = self._find(boot_id, scheme)
            if known is not None:
                self._mark(known, why)

    def is_measured(self, boot_id: str) -> None:
        """Every path to this peer was tried."""
        with self._lock:
            paths = self._peers.get(boot_id)
            if paths is not None:
                paths.is_probed, paths.used_s = True, self._clock.monotonic_s()
                self._version += 1

    def sweep(self) -> None:
        """Marks what has failed while it was not used; forgets peers that no path has reached for a while."""
        with self._lock:
            forgotten_s = self._clock.monotonic_s() - FORGET_AFTER_S
            for boot_id, paths in list(self._peers.items()):
                for known in paths.by_scheme.values():
                    why = known.endpoint.failure() if known.endpoint is not None else ""
                    if why:
                        self._mark(known, why)
                if all(known.endpoint is None for known in paths.by_scheme.values()) and paths.used_s < forgotten_s:
                    self.forget(boot_id)

    def news(self, since: int) -> tuple[int, list[Path]]:
        """(version of the table, the table); the table is empty if the version is the one that is known already."""
        with self._lock:
            if self._version == since:
                return since, []
            return self._version, [path for paths in self._peers.values() for path in paths.show()]

    # ---- inside the lock ----

    def _meet(self, peer: Peer, offers: Sequence[tuple[str, bytes]]) -> _PeerPaths:
        paths = self._peers.get(peer.boot_id)
        if paths is None:
            fitting = candidates(offers, self._transports)
            paths = _PeerPaths(peer, fitting, {scheme: _Known() for scheme, _ in fitting})
            paths.used_s = self._clock.monotonic_s()
            self._peers[peer.boot_id] = paths
            self._version += 1
        return paths

    def _find(self, boot_id: str, scheme: str) -> _Known | None:
        paths = self._peers.get(boot_id)
        return paths.by_scheme.get(scheme) if paths is not None else None

    def _open(self, paths: _PeerPaths, scheme: str) -> Endpoint:
        """Raises TransferError. An endpoint that has failed is replaced."""
        known = paths.by_scheme[scheme]
        if known.endpoint is not None and known.endpoint.failure():
            _close(known)
        if known.endpoint is None:
            known.endpoint = self._transports[scheme].connect(dict(paths.offers)[scheme])
        return known.endpoint

    def _mark(self, known: _Known, why: str) -> None:
        """Takes the path out of use until a probe succeeds: after a while, each time a longer one."""
        known.why_failed = why or "failed"
        backoff_s = min(BACKOFF_S * 2.0**known.num_failures, LONGEST_BACKOFF_S)
        known.num_failures += 1
        known.num_lost_writes = 0
        known.retry_at_s = self._clock.monotonic_s() + backoff_s
        _close(known)
        self._version += 1


def _close(known: _Known) -> None:
    if known.endpoint is not None:
        known.endpoint.close()
        known.endpoint = None
