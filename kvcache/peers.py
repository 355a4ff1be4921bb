"""Other hosts' arenas as a tier: what any of them has is read from there, nothing is put.

    contains ──▶ Directory, fed by every peer's events (PeerLink)
    get      ──▶ a peer that has it ══ stream ══▶ straight into the caller's memory, seal compared

A wrong directory costs a miss. A peer that fails is left out by a breaker of its own, and the next one that has the
block is asked; only when no peer is well does a call raise TierError.

Memory model: `get` receives into the caller's memory in the caller's thread, so nothing is written after it returned.
Threading: any thread. One thread per peer hears what it has.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from core.clock import Clock, SystemClock
from core.errors import TransferError
from kvcache.directory import Directory
from kvcache.keys import BlockKey
from kvcache.peer_link import PeerLink
from kvcache.tier import TierError, TierFigures

FETCH_TIMEOUT_S = 1.0
"""For one block of one peer."""

GET_TIMEOUT_S = 1.5
"""For one block of all peers that have it; less than the server waits for a tier."""


class PeersTier:
    """The arenas behind these addresses (HOST:PORT of `listen=`). A peer that is not there is tried again."""

    name = "peer"
    is_written = False

    def __init__(self, peers: Sequence[str], clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._directory = Directory()
        self._links = {peer: PeerLink(peer, self._directory, self._clock) for peer in peers}
        self._lock = threading.Lock()
        self._num_corrupt = 0
        self._is_closed = False

    def contains(self, keys: Sequence[BlockKey]) -> int:
        """What the directory says of the peers that are worth asking now."""
        if not self._directory.prefix(keys[:1], self._links):
            return 0  # no peer is tried for a block that none has
        return self._directory.prefix(keys, [link.peer for link in self._links.values() if link.allows()])

    def get(self, key: BlockKey, into: memoryview) -> int | None:
        """See Tier. Raises TierError if the block should be there, did not come, and no other peer is well."""
        if self._is_closed:
            raise TierError("the lines to the peers are closed")
        if not len(into):
            return None
        deadline_s = self._clock.monotonic_s() + GET_TIMEOUT_S
        failures: dict[str, str] = {}
        for peer in self._directory.holders(key):
            remaining_s = deadline_s - self._clock.monotonic_s()
            if remaining_s <= 0:
                break
            try:
                digest = self._fetch(self._links[peer], key, into, min(remaining_s, FETCH_TIMEOUT_S))
            except TransferError as error:
                failures[peer] = f"{peer}: {error}"
                self._links[peer].bad()
                continue
            if digest is not None:
                return digest
        if failures and not any(link.is_well for link in self._links.values() if link.peer not in failures):
            raise TierError("; ".join(failures.values()))
        return None

    def put(self, key: BlockKey, digest: int, block: memoryview) -> bool:
        """Never keeps anything: peers keep what they computed."""
        return False

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """Nothing: what peers have is theirs."""

    def figures(self) -> TierFigures:
        """blocks: that the directory knows, each as often as peers have it. connected: peers."""
        connected = sum(link.streams is not None for link in self._links.values())
        with self._lock:
            corrupt = self._num_corrupt
        return TierFigures(blocks=len(self._directory), corrupt=corrupt, more={"connected": connected})

    def close(self) -> None:
        """Hangs up; every later get raises TierError. May be called again."""
        if not self._is_closed:
            self._is_closed = True
            for link in self._links.values():
                link.close()

    def _fetch(self, link: PeerLink, key: BlockKey, into: memoryview, timeout_s: float) -> int | None:
        """The digest, or None if the peer does not have the block, or sent something else. Raises TransferError if
        nothing whole came in time."""
        streams = link.streams
        if streams is None:
            raise TransferError(link.why_down)
        arrived = streams.fetch(key, into, timeout_s)
        if arrived is not None and arrived.is_sound:
            link.good()
            return arrived.digest
        self._directory.discard(link.peer, [key])
        with self._lock:
            self._num_corrupt += arrived is not None
        return None
