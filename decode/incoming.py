"""The hand-offs that an instance receives, from first look to last: what is known of each, and how much they hold.

Threads: none of its own; the receiver's lock guards it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from core.handoff import Peer
from core.prompt import Prompt
from decode.land import Lost, Received
from transport.handoff import Receiving
from transport.messages import Accept

SILENT_PEER_S = 5.0
"""How long a peer may take to answer a Cancel before whoever started it is asked to end it."""


@dataclass
class Incoming:
    """One hand-off as the decode side sees it: tokens found in the engine's cache, then those of the KV cache's tiers,
    then those asked from P. `retried`: it failed, and the engine computes the prompt. ended: how, by our ranks."""

    prompt: Prompt
    prefill: Peer
    deadline_s: float
    state: Receiving = Receiving.NEW
    found_tokens: int = 0
    cached_tokens: int = 0
    asked_tokens: int = 0
    block_ids: tuple[int, ...] = ()
    retried: bool = False
    client_gone: bool = False
    accept: Accept | None = None
    armed_ranks: set[int] = field(default_factory=set)
    ended: dict[int, Received | Lost] = field(default_factory=dict)
    revoked_s: float = 0.0
    why: str = ""

    @property
    def id(self) -> str:
        return self.prompt.handoff.id

    @property
    def before_tokens(self) -> int:
        """Of the prompt, before the first that is asked from P."""
        return self.found_tokens + self.cached_tokens

    def __repr__(self) -> str:
        return f"<Incoming {self.id} {self.state.value} {len(self.block_ids)} blocks from {self.prefill.name}>"


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
