"""In which orders contexts have been computed, one behind the other: what may be a prefix in the caches, what cannot.

    computed before: A      A B          asked for now: A B C ──▶ A, B are the prefix, C is recomputed
                                                        B A   ──▶ both are recomputed: B was never first

A block's key covers everything before it, so parts in another order are other blocks. This says what has been computed,
not what a cache still has: that is counted by the instances, in `tokens` of the request's record.

Memory: the last MAX_ORDERS orders. Threading: the event loop's thread alone.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from typing import Any

from proxy.fields import Kind
from proxy.split import FIELDS, Endpoint

MAX_ORDERS = 8192
_NO_RENDERING = frozenset(
    {"messages", "prompt", "suffix", "add_generation_prompt", "continue_final_message"}
    | {"cache_salt", "priority", "session_id", "model"}
)
"""Fields of the prompt that come behind the contexts, say nothing about tokens, or are compared by themselves."""


class Orders:
    """Sequences of context ids by the rendering under which they were computed."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, tuple[str, ...]], None] = OrderedDict()

    def num_computed(self, rendering: str, ids: tuple[str, ...]) -> int:
        """How many of the ids, from the first, have been computed in this order."""
        count = 0
        for end in range(1, len(ids) + 1):
            if (rendering, ids[:end]) not in self._known:
                break
            self._known.move_to_end((rendering, ids[:end]))
            count = end
        return count

    def add(self, rendering: str, ids: tuple[str, ...]) -> None:
        """They are computed now, in this order."""
        for end in range(1, len(ids) + 1):
            self._known[rendering, ids[:end]] = None
            self._known.move_to_end((rendering, ids[:end]))
        while len(self._known) > MAX_ORDERS:
            self._known.popitem(last=False)

    def forget(self, context_id: str) -> None:
        """The context is no more."""
        for key in [key for key in self._known if context_id in key[1]]:
            del self._known[key]


def rendering_of(endpoint: Endpoint, fields: dict[str, Any], model: str) -> str:
    """Equal for two bodies that turn the same contexts into the same tokens."""
    named = FIELDS[endpoint]
    deciding = {
        name: value
        for name, value in fields.items()
        if named.get(name) is Kind.PROMPT and name not in _NO_RENDERING and value is not None
    }
    text = json.dumps([endpoint.value, model, deciding], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
