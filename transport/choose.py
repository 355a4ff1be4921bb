"""Which transport joins two instances: the best that both have and that reaches the other.

Memory and threading: none of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from core.errors import TransferError
from transport.base import Transport
from transport.schemes import is_reachable


def choose(
    offers: Sequence[tuple[str, bytes]], own: Mapping[str, Transport], pinned: str | None = None
) -> tuple[str, bytes]:
    """The first offer, best first, that we have too and that can reach us; only `pinned` where it is given.

    Raises TransferError naming both sides' schemes if none fits.
    """
    for scheme, description in offers:
        if scheme in own and scheme == (pinned or scheme) and is_reachable(scheme, description):
            return scheme, description
    theirs, ours = ", ".join(scheme for scheme, _ in offers) or "none", ", ".join(own) or "none"
    wanted = f"; only {pinned} is wanted" if pinned else ""
    raise TransferError(f"no transport joins both sides: offered {theirs}; ours {ours}{wanted}")
