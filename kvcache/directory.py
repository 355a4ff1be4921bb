"""Who has which block, as peers told: soft state, fed by their events, never asked over a network.

    Known, Changed of one peer ──▶ its set of keys        holders(key), prefix(keys) ◀── the peers' tier

It may be behind, or wrong: then a fetch finds nothing, and that is a miss. A peer whose connection ended has nothing.

Memory model: about 100 bytes per block and peer, at most MAX_KEYS blocks in all; what does not fit is not found.
Threading: any thread; one lock, held for a few thousand keys at most.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence

from kvcache.keys import BlockKey

MAX_KEYS = 2 << 20


class Directory:
    """The blocks of every peer, by the peer's address."""

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._lock = threading.Lock()
        self._keys: dict[str, set[BlockKey]] = {}
        self._max_keys = max_keys
        self._num_keys = 0

    def add(self, peer: str, keys: Collection[BlockKey]) -> None:
        """The peer has these."""
        with self._lock:
            known = self._keys.setdefault(peer, set())
            before = len(known)
            for key in keys:
                if self._num_keys + len(known) - before >= self._max_keys:
                    break
                known.add(key)
            self._num_keys += len(known) - before

    def discard(self, peer: str, keys: Collection[BlockKey]) -> None:
        """The peer does not have these (any more)."""
        with self._lock:
            known = self._keys.get(peer, set())
            before = len(known)
            known.difference_update(keys)
            self._num_keys += len(known) - before

    def forget(self, peer: str) -> None:
        """Nothing is known of this peer any more."""
        with self._lock:
            self._num_keys -= len(self._keys.pop(peer, ()))

    def holders(self, key: BlockKey) -> list[str]:
        """The peers that have a block, each key's list in an order of its own, so that they share the work."""
        with self._lock:
            found = [peer for peer, known in self._keys.items() if key in known]
        first = key[0] % len(found) if found else 0
        return found[first:] + found[:first]

    def prefix(self, keys: Sequence[BlockKey], peers: Collection[str]) -> int:
        """How many of the first keys these peers have between them, without a gap."""
        with self._lock:
            known = [self._keys[peer] for peer in peers if peer in self._keys]
            for count, key in enumerate(keys):
                if not any(key in each for each in known):
                    return count
            return len(keys)

    def __len__(self) -> int:
        """Blocks, each as often as peers have it."""
        return self._num_keys
