"""One request's prompt as the cache sees it: its blocks' names, and what is known of whoever asks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvcache.keys import BlockKey
from kvcache.partial import PartialBlocks


@dataclass(frozen=True)
class KeyedPrompt:
    """keys: of the full blocks; partials: of what lies between them and its end. tenant: on whose account blocks are
    kept (keys.tenant_of). within_s: the time in which the request must be served."""

    request_id: str
    num_tokens: int
    keys: Sequence[BlockKey]
    partials: PartialBlocks
    tenant: bytes = b""
    within_s: float = math.inf
