"""What the hand-off logic knows of one engine request: its ticket and its prompt, never the engine's own object."""

from __future__ import annotations

import msgspec

from core.handoff import Handoff


class Prompt(msgspec.Struct, frozen=True):
    """One request as its engine sees it.

    request_id: the engine's id (it adds random characters to the proxy's; never compared between instances).
    handoff: its ticket.
    num_tokens: of the prompt.
    hash: over the token ids, the last chained block hash (which covers adapters, images and cache salt) and the
        adapter's name; equal on both sides or the hand-off is refused, since each side tokenises for itself.
    """

    request_id: str
    handoff: Handoff
    num_tokens: int
    hash: bytes
