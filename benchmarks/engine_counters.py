"""What an engine counts itself, from its own /metrics: the same three figures for every system."""

from __future__ import annotations

import re

import msgspec

from cluster.members import get
from core.errors import BatonError

_TIMEOUT_S = 5.0
_NAMES = ("prompt_tokens_total", "prefix_cache_hits_total", "external_prefix_cache_hits_total")
_LINE = re.compile(rf"^vllm:({'|'.join(_NAMES)})(?:\{{[^}}]*\}})? (\S+)$", re.MULTILINE)


class EngineCounters(msgspec.Struct, frozen=True):
    """Prompt tokens since the engine's start: of all requests, found in its own cache, taken from outside."""

    prompt: int
    local: int
    outside: int

    def since(self, before: EngineCounters) -> EngineCounters:
        return EngineCounters(self.prompt - before.prompt, self.local - before.local, self.outside - before.outside)


def counters_of(engine_url: str) -> EngineCounters:
    """Raises BatonError if the engine does not tell."""
    status, body = get(f"{engine_url}/metrics", _TIMEOUT_S)
    if status != 200:
        raise BatonError(f"{engine_url}/metrics answers {status}")
    return parsed(body.decode())


def parsed(text: str) -> EngineCounters:
    """Sums over labels; a counter that is not there is 0."""
    sums = dict.fromkeys(_NAMES, 0.0)
    for name, value in _LINE.findall(text):
        sums[name] += float(value)
    return EngineCounters(*(int(sums[name]) for name in _NAMES))
