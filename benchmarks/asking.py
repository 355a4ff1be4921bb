"""Asks one system one thing at a time, and says where the prompt's tokens came from, by the engine's own counters."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from benchmarks.cache_results import Answered
from benchmarks.cache_systems import Kind
from benchmarks.client import Streamed, ask, record_of
from benchmarks.contestant import Contestant
from benchmarks.engine_counters import EngineCounters, counters_of
from benchmarks.systems import MODEL_NAME
from core.clock import Clock

COUNT_TIMEOUT_S = 3.0
_POLL_S = 0.01


class Asker:
    """One client of one system."""

    def __init__(self, contestant: Contestant, clock: Clock) -> None:
        self._contestant = contestant
        self._clock = clock

    def ask(self, prompt: Sequence[int], max_tokens: int) -> Answered:
        """Waits for the whole answer, and for the engine to have counted it. Raises BatonError."""
        contestant = self._contestant
        before = counters_of(contestant.engine_url)
        body = {"model": MODEL_NAME, "prompt": list(prompt), "max_tokens": max_tokens}
        begun_s = self._clock.monotonic_s()
        streamed = ask(contestant.url, body | {"ignore_eos": True, "temperature": 0}, self._clock)
        done_ms = (self._clock.monotonic_s() - begun_s) * 1e3
        counted = self._counted(before, len(prompt))
        record = record_of(contestant.url, streamed.request_id, handed_off=False)
        if contestant.system.kind is Kind.BATON:
            record = self._reported(record, streamed)
        answered = Answered(
            prompt_tokens=len(prompt),
            first_token_ms=streamed.arrivals_s[0] * 1e3 if streamed.arrivals_s else 0.0,
            done_ms=done_ms,
            gaps_ms=tuple(gap * 1e3 for gap in streamed.gaps_s),
            from_engine=counted.local,
            from_outside=counted.outside,
            problem=_problem(record, streamed, counted, max_tokens, len(prompt)),
        )
        return _with_tiers(answered, record)

    def _counted(self, before: EngineCounters, num_tokens: int) -> EngineCounters:
        """The engine's counters come from a thread of its own, a moment later."""
        deadline = time.monotonic() + COUNT_TIMEOUT_S
        while True:
            counted = counters_of(self._contestant.engine_url).since(before)
            if counted.prompt >= num_tokens or time.monotonic() > deadline:
                return counted
            time.sleep(_POLL_S)

    def _reported(self, record: dict[str, Any], streamed: Streamed) -> dict[str, Any]:
        """Baton's instances tell the proxy a moment after the end what each tier gave."""
        deadline = time.monotonic() + COUNT_TIMEOUT_S
        while record.get("tokens", {}).get("prompt") is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            record = record_of(self._contestant.url, streamed.request_id, handed_off=False)
        return record


def _problem(
    record: dict[str, Any], streamed: Streamed, counted: EngineCounters, max_tokens: int, prompt_tokens: int
) -> str:
    if record.get("status") != "done":
        return f"status {record.get('status')}"
    if streamed.num_tokens != max_tokens:
        return f"{streamed.num_tokens} tokens instead of {max_tokens}"
    if counted.prompt != prompt_tokens:
        return f"the engine counted {counted.prompt} prompt tokens instead of {prompt_tokens}"
    return ""


def _with_tiers(answered: Answered, record: dict[str, Any]) -> Answered:
    parts = (record.get("decode") or {}).get("from_cache", [])
    tiers: dict[str, int] = {}
    for part in parts:
        tiers[part["tier"]] = tiers.get(part["tier"], 0) + part["tokens"]
    return msgspec.structs.replace(
        answered,
        tiers=tiers,
        load_ms=sum(part["ms"] for part in parts),
        waited_ms=sum(part["waited_ms"] for part in parts),
        load_bytes=sum(part["bytes"] for part in parts),
    )
