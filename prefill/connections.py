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

from core.clock import Clock
from core.errors import TransferError
from core.handoff import Peer
from core.path import Path
from prefill.peer_paths import Far, Known, PeerPaths, Way
from transport.base import Transport
from transport.choose import candidates
from transport.probe import Measurement

BACKOFF_S = 10.0
LONGEST_BACKOFF_S = 300.0
FORGET_AFTER_S = 60.0
MAX_RECEIVERS = 1024
MAX_LOST_WRITES = 3
"""Hand-offs whose writes fail one after the other, on an endpoint that says nothing, until the path counts as failed.
One can fail without the path's fault: its receiver has given it up."""


class Connections:
    """All ways of one worker."""

    def __init__(self, transports: Mapping[str, Transport], clock: Clock) -> None:
        self._transports = transports
        self._clock = clock
        self._lock = threading.RLock()
        self._peers: dict[Far, PeerPaths] = {}
        self._version = 0
        self._is_closed = False

    # ---- the engine's thread ----

    def pick(self, peer: Peer, offers: Sequence[tuple[str, bytes]], without: Sequence[str] = (), rank: int = 0) -> Way:
        """The way that a hand-off to one rank of a peer takes now.

        Raises TransferError if no transport joins both sides, or all that do are left out.
        """
        with self._lock:
            paths = self._meet(peer, offers, rank)
            paths.used_s = self._clock.monotonic_s()
            while (scheme := paths.chosen(without)) is not None:
                try:
                    return self._open(paths, scheme)
                except TransferError as error:
                    self._mark(paths.by_scheme[scheme], str(error))
                    without = [*without, scheme]
            raise TransferError(f"every transport to {peer.name} has failed: {', '.join(without)}")

    def lost_write(self, way: Way, why: str) -> bool:
        """A hand-off's write over this way has failed. True: so has the path, and the next best is taken."""
        with self._lock:
            known = self._find(way)
            if known is None:
                return False
            if known.endpoint is not way.endpoint:
                return True  # another hand-off has noticed before
            known.num_lost_writes += 1
            if not way.endpoint.failure() and known.num_lost_writes < MAX_LOST_WRITES:
                return False
            self._mark(known, why)
            return True

    def wrote(self, way: Way) -> None:
        """A hand-off was written completely."""
        with self._lock:
            known = self._find(way)
            if known is not None:
                known.num_lost_writes = 0
                self._version += bool(known.why_failed)
                known.why_failed = ""

    def forget(self, boot_id: str) -> None:
        """The peer is dead: nothing of ours touches its memory after this."""
        with self._lock:
            for far in [far for far in self._peers if far.boot_id == boot_id]:
                self._drop(far)

    def close(self) -> None:
        """Closes every endpoint: after this, nothing of this worker writes anywhere."""
        with self._lock:
            self._is_closed = True
            for far in list(self._peers):
                self._drop(far)

    def num_endpoints(self) -> int:
        """Paths that are open."""
        with self._lock:
            return sum(
                known.endpoint is not None for paths in self._peers.values() for known in paths.by_scheme.values()
            )

    # ---- the prober's thread ----

    def greet(self, peer: Peer, offers: Sequence[tuple[str, bytes]], rank: int = 0) -> None:
        """A rank of a peer expects to be measured. Raises TransferError if no transport joins both sides, or too many
        peers are known: anyone may say so."""
        with self._lock:
            if len(self._peers) >= MAX_RECEIVERS and Far(peer.boot_id, rank) not in self._peers:
                raise TransferError(f"{MAX_RECEIVERS} receivers are known; no more are measured")
            self._meet(peer, offers, rank).expects_probes = True

    def due(self) -> list[Far]:
        """Receivers that should be measured now: new ones, and those with a failed path whose time is up."""
        with self._lock:
            now_s = self._clock.monotonic_s()
            return [far for far, paths in self._peers.items() if paths.is_due(now_s)]

    def open_all(self, far: Far) -> list[Way]:
        """Opens every path to a receiver."""
        with self._lock:
            paths, ways = self._peers.get(far), []
            for scheme, _ in paths.offers if paths is not None else ():
                assert paths is not None
                try:
                    ways.append(self._open(paths, scheme))
                except TransferError as error:
                    self._mark(paths.by_scheme[scheme], str(error))
            return ways

    def measured(self, way: Way, measurement: Measurement | None) -> None:
        """A path works; None: it was not measured, for lack of another to compare it with."""
        with self._lock:
            known = self._find(way)
            if known is not None:
                known.measurement, known.why_failed, known.num_lost_writes = measurement, "", 0
                self._version += 1

    def unreachable(self, way: Way, why: str) -> None:
        """A path does not work."""
        with self._lock:
            known = self._find(way)
            if known is not None:
                self._mark(known, why)

    def is_measured(self, far: Far) -> None:
        """Every path to this receiver was tried."""
        with self._lock:
            paths = self._peers.get(far)
            if paths is not None:
                paths.is_probed, paths.used_s = True, self._clock.monotonic_s()
                self._version += 1

    def sweep(self) -> None:
        """Marks what has failed while it was not used; forgets peers that no path has reached for a while."""
        with self._lock:
            forgotten_s = self._clock.monotonic_s() - FORGET_AFTER_S
            for far, paths in list(self._peers.items()):
                for known in paths.by_scheme.values():
                    why = known.endpoint.failure() if known.endpoint is not None else ""
                    if why:
                        self._mark(known, why)
                if all(known.endpoint is None for known in paths.by_scheme.values()) and paths.used_s < forgotten_s:
                    self._drop(far)

    def news(self, since: int) -> tuple[int, list[Path]]:
        """(version of the table, the table); the table is empty if the version is the one that is known already."""
        with self._lock:
            if self._version == since:
                return since, []
            return self._version, [path for paths in self._peers.values() for path in paths.show()]

    # ---- inside the lock ----

    def _meet(self, peer: Peer, offers: Sequence[tuple[str, bytes]], rank: int) -> PeerPaths:
        far = Far(peer.boot_id, rank)
        paths = self._peers.get(far)
        if paths is None:
            fitting = candidates(offers, self._transports)
            paths = PeerPaths(peer, rank, fitting, {scheme: Known() for scheme, _ in fitting})
            paths.used_s = self._clock.monotonic_s()
            self._peers[far] = paths
            self._version += 1
        return paths

    def _drop(self, far: Far) -> None:
        self._version += 1
        for known in self._peers.pop(far).by_scheme.values():
            _close(known)

    def _find(self, way: Way) -> Known | None:
        paths = self._peers.get(way.far)
        return paths.by_scheme.get(way.scheme) if paths is not None else None

    def _open(self, paths: PeerPaths, scheme: str) -> Way:
        """Raises TransferError. An endpoint that has failed is replaced."""
        if self._is_closed:
            raise TransferError("this instance stops")
        known = paths.by_scheme[scheme]
        if known.endpoint is not None and known.endpoint.failure():
            _close(known)
        if known.endpoint is None:
            known.endpoint = self._transports[scheme].connect(dict(paths.offers)[scheme])
        return Way(Far(paths.peer.boot_id, paths.rank), scheme, known.endpoint)

    def _mark(self, known: Known, why: str) -> None:
        """Takes the path out of use until a probe succeeds: after a while, each time a longer one."""
        known.why_failed = why or "failed"
        backoff_s = min(BACKOFF_S * 2.0**known.num_failures, LONGEST_BACKOFF_S)
        known.num_failures += 1
        known.num_lost_writes = 0
        known.retry_at_s = self._clock.monotonic_s() + backoff_s
        _close(known)
        self._version += 1


def _close(known: Known) -> None:
    if known.endpoint is not None:
        known.endpoint.close()
        known.endpoint = None
