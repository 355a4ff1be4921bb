"""What a run leaves: every sample raw, and what it was measured on. The JSON of `--out` is this, as it is."""

from __future__ import annotations

from typing import Any

import msgspec

from benchmarks.machine import Machine
from benchmarks.memcpy import CopyTimes
from benchmarks.systems import Recipe


class Handover(msgspec.Struct, frozen=True):
    """One hand-off, from the proxy's record.

    write_ms: the prefill worker's time inside Endpoint.write with its checks; most bytes move on other threads.
    copy_ms: what all threads of the prefill worker together spent copying; 0 where others move the bytes (not shm).
    digest_ms: beside it, for the digest (over shm four cache lines of each block, over zmq every byte); None where the
        record does not tell it.
    moving_to_landed_ms: from the first write, with the computation in between.
    last_layer_to_landed_ms: from the call behind the last layer's attention on P, in the last chunk and before that
        layer's write, until D's worker has checked everything; None where the record does not tell it. While P's
        scheduler sends Landed after the step, the rest of the forward pass (o_proj and MLP of the last layer, head,
        sampling) lies in between.
    computed_to_landed_ms, sent_to_landed_ms: the last parts of it, from the end of P's forward pass and from Landed
        leaving P; None where the record does not tell them.
    check_ms: the very last part, D's worker counting and comparing digests.
    landed_to_first_ms: from then until the proxy saw the first token: D's own step, and its way out.
    """

    tokens: int
    num_bytes: int
    chunks: int
    write_ms: float
    copy_ms: float
    accepted_ms: float
    moving_to_landed_ms: float
    last_layer_to_landed_ms: float | None
    check_ms: float
    landed_to_first_ms: float
    digest_ms: float | None = None
    computed_to_landed_ms: float | None = None
    sent_to_landed_ms: float | None = None


class Sample(msgspec.Struct, frozen=True):
    """One request. problem: why it does not count; empty if it does."""

    system: str
    prompt_tokens: int
    repeat: int
    first_token_ms: float
    gaps_ms: tuple[float, ...]
    handover: Handover | None
    problem: str
    record: dict[str, Any]


class Copy(msgspec.Struct, frozen=True):
    """The yardstick beside the samples of one prompt length and repeat."""

    prompt_tokens: int
    repeat: int
    times: CopyTimes


class Run(msgspec.Struct, frozen=True):
    """One `baton bench handoff`. cores: of each engine, by system/instance."""

    command: str
    date: str
    machine: Machine
    recipe: Recipe
    cores: dict[str, tuple[int, ...]]
    block_size: int
    samples: tuple[Sample, ...]
    copies: tuple[Copy, ...]


def handover_of(record: dict[str, Any]) -> Handover | None:
    """None where nothing was handed over."""
    prefill, decode, moments = record.get("prefill"), record.get("decode"), record.get("moments_ms", {})
    tokens = record.get("tokens", {}).get("handed_over") or 0
    if not (prefill and decode and tokens and "landed" in moments):
        return None
    at_prefill = prefill.get("moments_ms", {})

    def to_landed(at_ms: float | None) -> float | None:
        return None if at_ms is None else moments["landed"] - at_ms

    return Handover(
        tokens=tokens,
        num_bytes=record["bytes"],
        chunks=int(prefill.get("chunks", 0)),
        write_ms=prefill.get("write_s", 0.0) * 1e3,
        copy_ms=prefill.get("copy_s", 0.0) * 1e3,
        accepted_ms=moments.get("accepted", 0.0),
        moving_to_landed_ms=moments["landed"] - moments.get("moving", 0.0),
        last_layer_to_landed_ms=to_landed(moments.get("last_layer", at_prefill.get("last_layer"))),
        check_ms=decode.get("check_s", 0.0) * 1e3,
        landed_to_first_ms=moments.get("first_token", moments["landed"]) - moments["landed"],
        digest_ms=prefill["digest_s"] * 1e3 if "digest_s" in prefill else None,
        computed_to_landed_ms=to_landed(moments.get("computed", at_prefill.get("computed"))),
        sent_to_landed_ms=to_landed(at_prefill.get("landed")),
    )


def problem_of(record: dict[str, Any], transport: str, prompt_tokens: int) -> str:
    """Why a sample is not what it claims to be: all tokens but one handed over. No transport: plain vLLM."""
    if record.get("status") != "done":
        return f"status {record.get('status')}"
    if not transport:
        return ""
    tokens, used = record.get("tokens", {}), record.get("path", {}).get("transport")
    if tokens.get("handed_over") != prompt_tokens - 1:
        why = record.get("path", {}).get("why") or record.get("outcome") or "not reported"
        return f"{tokens.get('handed_over')} of {prompt_tokens - 1} tokens were handed over ({why})"
    if used != transport:
        return f"went over {used}"
    if tokens.get("computed") != 1 or tokens.get("found_locally"):
        return f"decode computed {tokens.get('computed')} and found {tokens.get('found_locally')} tokens"
    return ""
