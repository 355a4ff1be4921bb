"""The hand-offs that an instance sends, from first word to last: what is known of each, by hand-off and by request.

Threads: none of its own; the sender's lock guards it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from core.clock import Clock
from core.handoff import Peer
from core.prompt import Prompt
from core.report import FromCache
from prefill.push import Pushed, whole
from transport.handoff import Sending
from transport.messages import Accept
from transport.runs import Lane

MAX_REMEMBERED = 20_000
"""Hand-offs kept after their end, so that a late message finds an answer; the oldest are forgotten."""

MAX_EARLY_BYTES = 64 << 20
"""Of Accepts that came before their requests, together; beyond it they are refused, and the peer computes."""

MAX_WHY_CHARACTERS = 1000
MAX_TIMEOUT_S = 86_400.0
_ACCEPT_COST_BYTES = 512


@dataclass
class Outgoing:
    """One hand-off as the prefill side sees it. lanes: which of our ranks write to which of the receiver's; parts: of
    those that have written everything; pushed: once all have."""

    id: str
    deadline_s: float
    state: Sending = Sending.NEW
    prompt: Prompt | None = None
    accept: Accept | None = None
    decode: Peer | None = None
    num_chunks: int = 0
    finished: bool = False
    why: str = ""
    lanes: list[Lane] = field(default_factory=list)
    parts: list[Pushed] = field(default_factory=list)
    pushed: Pushed | None = None
    quiet_ranks: set[int] = field(default_factory=set)
    from_cache: list[FromCache] = field(default_factory=list)
    moments: dict[str, float] = field(default_factory=dict)

    def add_part(self, part: Pushed) -> None:
        """One pair of ranks is done."""
        self.parts.append(part)
        if len(self.parts) == len(self.lanes):
            self.pushed = whole(self.parts)

    def __repr__(self) -> str:
        to = self.decode.name if self.decode else "?"
        return f"<Outgoing {self.id} {self.state.value} to {to}>"


class OutgoingTable:
    """All of them. `timeout_s`: of a hand-off that is heard of before its ticket."""

    def __init__(self, clock: Clock, timeout_s: float) -> None:
        self._clock = clock
        self._timeout_s = timeout_s
        self._all: OrderedDict[str, Outgoing] = OrderedDict()
        self._by_request: dict[str, Outgoing] = {}
        self._early_bytes: dict[str, int] = {}

    def __iter__(self) -> Iterator[Outgoing]:
        """Over a copy: what is found may be changed."""
        return iter(list(self._all.values()))

    def of(self, handoff: str, timeout_s: float | None = None) -> Outgoing:
        """By its id; made at first sight."""
        out = self._all.get(handoff)
        if out is None:
            is_sound = timeout_s is not None and 0 < timeout_s <= MAX_TIMEOUT_S  # a peer's own word
            deadline_s = self._clock.monotonic_s() + (timeout_s if is_sound and timeout_s else self._timeout_s)
            out = self._all[handoff] = Outgoing(handoff, deadline_s)
            self._trim()
        return out

    def get(self, handoff: str) -> Outgoing | None:
        """By its id, if it is known."""
        return self._all.get(handoff)

    def of_request(self, request_id: str) -> Outgoing | None:
        """By the engine's request, between its first hook and its last."""
        return self._by_request.get(request_id)

    def has_room(self, out: Outgoing, accept: Accept) -> bool:
        """Whether an Accept can be kept: those that come before their request may be anybody's invention."""
        if out.prompt is not None:
            return True
        if self.num_early_bytes() + _bytes_of(accept) > MAX_EARLY_BYTES:
            for handoff in list(self._early_bytes):
                self._forget_ended(handoff)
        if self.num_early_bytes() + _bytes_of(accept) > MAX_EARLY_BYTES:
            return False
        self._early_bytes[out.id] = _bytes_of(accept)
        return True

    def bind(self, out: Outgoing, prompt: Prompt) -> None:
        """The engine has the request now."""
        self._early_bytes.pop(out.id, None)
        out.prompt = prompt
        self._by_request[prompt.request_id] = out

    def unbind(self, out: Outgoing) -> None:
        """The engine has done with the request, and nothing reads its blocks."""
        out.accept = None  # its block lists are the larger part of what is remembered
        out.lanes, out.parts = [], []
        if out.prompt is not None:
            self._by_request.pop(out.prompt.request_id, None)

    def bound(self) -> list[Outgoing]:
        """Those whose request the engine has."""
        return list(self._by_request.values())

    def num_early_bytes(self) -> int:
        """Of Accepts that came before their requests and may still be used."""
        return sum(self._early_bytes.values())

    def _forget_ended(self, handoff: str) -> None:
        """The block lists of an Accept whose hand-off ended before its request came."""
        out = self._all.get(handoff)
        if out is None or out.state is Sending.RELEASED:
            del self._early_bytes[handoff]
            if out is not None:
                out.accept = None

    def _trim(self) -> None:
        excess = len(self._all) - MAX_REMEMBERED
        if excess > 0:
            ended = [i for i, out in self._all.items() if out.state is Sending.RELEASED and out.finished]
            stale = ended or [i for i, out in self._all.items() if out.prompt is None]
            for handoff in stale[:excess]:
                del self._all[handoff]
                self._early_bytes.pop(handoff, None)


def _bytes_of(accept: Accept) -> int:
    descriptions = sum(len(description) for schemes in accept.schemes for _, description in schemes)
    return _ACCEPT_COST_BYTES * max(len(accept.schemes), 1) + 8 * len(accept.block_ids) + descriptions
