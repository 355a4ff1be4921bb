"""Which transport joins two instances: of those that both have and that reach the other, the fastest one measured.

Memory and threading: none of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from core.errors import TransferError
from transport.base import Transport
from transport.probe import Measurement
from transport.schemes import is_reachable

TIE_SHARE = 0.8
"""A scheme that needs no more than the fastest one's time over this share is as good: then the order of preference
decides, and noise does not."""


def candidates(
    offers: Sequence[tuple[str, bytes]], own: Mapping[str, Transport], pinned: str | None = None
) -> list[tuple[str, bytes]]:
    """The offers, best first, that we have too and that can reach us; only `pinned` where it is given.

    Raises TransferError naming both sides' schemes if none fits.
    """
    fitting = [
        (scheme, description)
        for scheme, description in offers
        if scheme in own and scheme == (pinned or scheme) and is_reachable(scheme, description)
    ]
    if fitting:
        return fitting
    theirs, ours = ", ".join(scheme for scheme, _ in offers) or "none", ", ".join(own) or "none"
    wanted = f"; only {pinned} is wanted" if pinned else ""
    raise TransferError(f"no transport joins both sides: offered {theirs}; ours {ours}{wanted}")


def choose(
    offers: Sequence[tuple[str, bytes]], own: Mapping[str, Transport], pinned: str | None = None
) -> tuple[str, bytes]:
    """The first candidate: what is taken before anything was measured."""
    return candidates(offers, own, pinned)[0]


def fastest(order: Sequence[str], measured: Mapping[str, Measurement]) -> str:
    """The scheme whose writes are fastest, of those in `order`; the first one where none of them was measured."""
    known = [scheme for scheme in order if scheme in measured]
    if not known:
        return order[0]
    moved = [scheme for scheme in known if measured[scheme].write_s]
    best_s = min((measured[scheme].write_s for scheme in moved), default=0.0)
    return next((scheme for scheme in moved if measured[scheme].write_s * TIE_SHARE <= best_s), known[0])
