"""Other hosts' arenas as a tier: what any of them has is read from there, nothing is put.

    contains ──▶ Directory (fed by every peer's events)
    get      ──▶ PeerLink: Fetch ══▶ holder ══ transport/ ══▶ a landing place ──▶ copied into the arena, seal compared

A wrong directory costs a miss. A peer that fails is left out by a breaker of its own, and the next one that has the
block is asked; only when no peer is well does a call raise TierError.

Memory model: see peer_landing. `get` writes into the caller's memory itself, in the caller's thread, so nothing is
written after it has returned.
Threading: any thread. One thread per peer, and those of the transport.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from contextlib import suppress

from core.clock import Clock, SystemClock
from core.errors import ProtocolError, TransferError
from kvcache import peer_words as words
from kvcache.directory import Directory
from kvcache.keys import BlockKey
from kvcache.peer_landing import PLACE_BYTES, Landings, Place
from kvcache.peer_link import Fetching, PeerLink
from kvcache.tier import TierError, TierFigures, seal

FETCH_TIMEOUT_S = 1.0
"""For one block of one peer."""

GET_TIMEOUT_S = 1.5
"""For one block of all peers that have it; less than the server waits for a tier."""


class PeersTier:
    """The arenas behind these addresses (HOST:PORT of `listen=`). A peer that is not there is tried again."""

    name = "peer"
    is_written = False
    lossy = ""

    def __init__(self, peers: Sequence[str], clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._directory = Directory()
        self._landings = Landings(self._clock)
        self._links = {peer: PeerLink(peer, self._directory, self._landings, self._clock) for peer in peers}
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
        if not 0 < len(into) <= PLACE_BYTES:
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
                failures[peer] = str(error)
                self._links[peer].bad()
                continue
            if digest is not None:
                return digest
        if failures and not any(link.is_well for link in self._links.values() if link.peer not in failures):
            raise TierError("; ".join(failures.values()))
        return None

    def get_whole(self, key: BlockKey, most_bytes: int) -> tuple[int, memoryview] | None:
        """Nothing: a peer is asked for a block of a known size, and gives it as it is."""
        return None

    def put(self, key: BlockKey, digest: int, block: memoryview) -> bool:
        """Never keeps anything: peers keep what they computed."""
        return False

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """Nothing: what peers have is theirs."""

    def clear(self) -> None:
        """Nothing, likewise."""

    def figures(self) -> TierFigures:
        """blocks: that the directory knows, each as often as peers have it."""
        connected = sum(link.places is not None for link in self._links.values())
        with self._lock:
            corrupt = self._num_corrupt
        return TierFigures(blocks=len(self._directory), corrupt=corrupt, more={"connected": connected})

    def close(self) -> None:
        """Hangs up; every later get raises TierError. May be called again."""
        if not self._is_closed:
            self._is_closed = True
            for link in self._links.values():
                link.close()
            self._landings.close()

    def _fetch(self, link: PeerLink, key: BlockKey, into: memoryview, timeout_s: float) -> int | None:
        """The digest, or None if the peer does not have the block, or sent something else. Raises TransferError if
        nothing came."""
        places, fetching = link.places, Fetching()
        if places is None:
            raise TransferError(f"{link.peer}: {link.why_down}")
        with places.lend(timeout_s, fetching.moved.set) as place:
            number = link.ask(key, len(into), (place.index, place.tag), fetching)
            try:
                has_moved = fetching.moved.wait(timeout_s)
            finally:
                link.give_up(number)
            notice = place.notice()
            if notice is not None:
                return self._opened(link, key, place, notice, into)
        if fetching.is_missing:
            self._directory.discard(link.peer, [key])
            return None
        raise TransferError(fetching.why_failed if has_moved else f"{link.peer}: no block within {timeout_s:.1f} s")

    def _opened(self, link: PeerLink, key: BlockKey, place: Place, notice: bytes, into: memoryview) -> int | None:
        """Copies a block to where it is wanted, and looks there whether it is what was sealed."""
        link.good()
        target = ctypes.addressof(ctypes.c_char.from_buffer(into))
        ctypes.memmove(target, place.address, len(into))
        with suppress(ProtocolError):
            sealed = words.decode_sealed(notice)
            if seal(key, sealed.digest, into) == sealed.seal:
                return sealed.digest
        with self._lock:
            self._num_corrupt += 1
        self._directory.discard(link.peer, [key])
        return None
