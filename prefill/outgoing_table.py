"""The hand-offs that an instance sends, by hand-off and by the engine's request, and how many it remembers.

Threads: none of its own; the sender's lock guards it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from core.prompt import Prompt
from prefill.outgoing import Means, Outgoing
from transport.handoff import Sending
from transport.messages import Accept

MAX_REMEMBERED = 20_000
"""Hand-offs kept after their end, so that a late message finds an answer; the oldest are forgotten."""

MAX_EARLY_BYTES = 64 << 20
"""Of Accepts that came before their requests, together; beyond it they are refused, and the peer computes."""

MAX_TIMEOUT_S = 86_400.0
_ACCEPT_COST_BYTES = 512


class OutgoingTable:
    """All of them. `timeout_s`: of a hand-off that is heard of before its ticket."""

    def __init__(self, means: Means, timeout_s: float) -> None:
        self._means = means
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
            deadline_s = self._means.ports.clock.monotonic_s() + (
                timeout_s if is_sound and timeout_s else self._timeout_s
            )
            out = self._all[handoff] = Outgoing(handoff, deadline_s, self._means)
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

    def unbind(self, out: Outgoing) -> str:
        """The engine has done with the request, and nothing reads its blocks. The request; empty if it never came."""
        out.accept = None  # its block lists are the larger part of what is remembered
        out.lanes, out.parts = [], []
        request_id = out.prompt.request_id if out.prompt is not None else ""
        self._by_request.pop(request_id, None)
        return request_id

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
