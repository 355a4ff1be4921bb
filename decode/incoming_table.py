"""The hand-offs that an instance receives, by hand-off and by the engine's request, and how much they hold.

Threads: none of its own; the receiver's lock guards it.
"""

from __future__ import annotations

from collections.abc import Iterator

from decode.incoming import Incoming
from transport.handoff import Receiving

SILENT_PEER_S = 5.0
"""How long a peer may take to answer a Cancel before whoever started it is asked to end it."""


class IncomingTable:
    """All of them, by hand-off and by the engine's request."""

    def __init__(self) -> None:
        self._all: dict[str, Incoming] = {}
        self._by_request: dict[str, Incoming] = {}

    def __iter__(self) -> Iterator[Incoming]:
        """Over a copy: what is found may be changed."""
        return iter(list(self._all.values()))

    def add(self, incoming: Incoming) -> None:
        """The engine has looked at its request."""
        self._by_request[incoming.prompt.request_id] = self._all[incoming.id] = incoming

    def get(self, handoff: str) -> Incoming | None:
        """By its id."""
        return self._all.get(handoff)

    def of_request(self, request_id: str) -> Incoming | None:
        """By the engine's request."""
        return self._by_request.get(request_id)

    def forget(self, incoming: Incoming) -> None:
        """The engine has done with the request, and nothing writes its blocks."""
        self._by_request.pop(incoming.prompt.request_id, None)
        self._all.pop(incoming.id, None)

    def num_waiting(self) -> int:
        """Hand-offs with reserved blocks."""
        return sum(1 for incoming in self._all.values() if incoming.block_ids)

    def reserved_blocks(self) -> int:
        """Blocks that may still be written."""
        return sum(len(i.block_ids) for i in self._all.values() if i.state is not Receiving.RELEASED)

    def silent_peers(self, now_s: float) -> list[str]:
        """Boot ids of peers that may still write into our blocks and have not answered for SILENT_PEER_S."""
        revoking = [i for i in self._all.values() if i.state is Receiving.REVOKING]
        return sorted({i.prefill.boot_id for i in revoking if now_s - i.revoked_s > SILENT_PEER_S})
