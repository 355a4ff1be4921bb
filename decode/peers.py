"""Peers whose connection broke lately."""

from __future__ import annotations

from core.clock import Clock

LOST_PEER_S = 10.0
"""How long no hand-off is asked of a peer whose connection broke."""


class LostPeers:
    """Not for ever: one broken connection is no proof of death, and to a peer that is dead the proxy sends nothing."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._since_s: dict[str, float] = {}

    def add(self, boot_id: str) -> None:
        """Its connection has just broken."""
        now_s = self._clock.monotonic_s()
        self._since_s = {known: at_s for known, at_s in self._since_s.items() if now_s - at_s < LOST_PEER_S}
        self._since_s[boot_id] = now_s

    def __contains__(self, boot_id: str) -> bool:
        at_s = self._since_s.get(boot_id)
        return at_s is not None and self._clock.monotonic_s() - at_s < LOST_PEER_S
