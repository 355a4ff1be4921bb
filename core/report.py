"""What an instance did for one request, as it tells the proxy: the source of `GET /requests/{id}`.

The words of the timeline, in order: queued, routed, accepted, moving, landed, first_token, done. The proxy stamps
queued, routed, first_token and done; the decode instance accepted and landed; the prefill instance moving.
"""

from __future__ import annotations

import msgspec

from core.handoff import Role


class FromCache(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one tier of the KV cache gave one request, counted by the worker that compared it. seconds: of the copy.
    waited_s: for how long of it the request did not get on; in_step: the copy ran beside the forward pass that computes
    with the tokens. saved_s: what computing them would have taken at this instance's measured pace, less the waiting; 0
    where that was never measured."""

    tier: str
    tokens: int
    num_bytes: int
    seconds: float
    saved_s: float = 0.0
    waited_s: float = 0.0
    in_step: bool = False


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One instance's account of one request; a later report of the same role and id replaces an earlier one.

    outcome: `landed` (KV was handed over), `local` (no hand-off was asked for), `declined` (decided against after
        the look-up), `fell_back` (asked for, but computed locally), `cancelled`, `sent`, `refused`, `failed`.
    why: one word or sentence for the outcome, for people and for the metric's label.
    tokens: of the prompt. handed_over is counted by the worker that received and checked the blocks.
    num_bytes: bytes of KV that arrived from P (decode) or left (prefill).
    from_cache: what each tier of the KV cache gave.
    moments: unix seconds by name.
    detail: counters that tests and benchmarks read, for example `bytes_before_last_layer`.
    """

    request_id: str
    instance: str
    role: Role
    outcome: str
    why: str = ""
    transport: str = ""
    prompt_tokens: int = 0
    handed_over: int = 0
    found_locally: int = 0
    computed: int = 0
    num_bytes: int = 0
    moments: dict[str, float] = {}
    detail: dict[str, float] = {}
    from_cache: list[FromCache] = []
