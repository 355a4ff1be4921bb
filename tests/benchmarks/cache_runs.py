"""Cache runs made by hand, so that tables and statistics are tested on numbers that one can check in the head."""

from __future__ import annotations

from typing import Any

from benchmarks.cache_results import (
    Answered,
    CacheRun,
    Cell,
    Header,
    LookupCell,
    PairCell,
    Raw,
    SurviveCell,
    TierCell,
    WorkloadCell,
)
from benchmarks.shapes import SHAPES
from benchmarks.systems import Recipe
from tests.benchmarks.runs import MACHINE

PROMPT_TOKENS = 4000
FOUND_TOKENS = 3968
NUM_BYTES = 100_000_000
HEADER = Header(
    recipe=Recipe(SHAPES["qwen2.5-1.5b-half"], "float32"),
    prompt_tokens=PROMPT_TOKENS,
    repeats=3,
    requests=100,
    pairs=6,
    text="plays.txt",
    hardware="amd-epyc-2-cores",
    vllm="0.32.0",
)


def answered(first_token_ms: float, prompt_tokens: int = PROMPT_TOKENS, **given: Any) -> Answered:
    """Decode steps of 20 ms; everything computed."""
    return Answered(prompt_tokens, first_token_ms, first_token_ms + 60.0, (20.0, 20.0, 20.0), **given)


def found(first_token_ms: float, tier: str, **given: Any) -> Answered:
    """A prompt that was found but for its end: 100 MB in 20 ms."""
    if tier == "engine":
        return answered(first_token_ms, from_engine=FOUND_TOKENS, **given)
    told: dict[str, Any] = (
        {"tiers": {tier: FOUND_TOKENS}, "load_ms": 20.0, "waited_ms": 2.0, "load_bytes": NUM_BYTES}
        if tier != "outside"
        else {}
    )
    return answered(first_token_ms, from_outside=FOUND_TOKENS, **(told | given))


def tier_cell(system: str, tier: str, warm_ms: float, **given: Any) -> TierCell:
    """Three samples of each, 1000 ms computed; memcpy of 10 GB/s, raw reads of 5 GB/s."""
    raws: tuple[Raw, ...] = (Raw("memcpy", NUM_BYTES, (0.01, 0.009, 0.02)),)
    if tier not in ("engine", "host", "outside", ""):
        raws += (Raw(tier, NUM_BYTES, (0.02, 0.02, 0.02)),)
    cold = tuple(answered(value) for value in (1000.0, 990.0, 1010.0))
    warm = tuple(
        found(value, tier, **given) if tier else answered(value) for value in (warm_ms, warm_ms - 1, warm_ms + 9)
    )
    return TierCell(system, PROMPT_TOKENS, cold, warm, raws if tier not in ("", "engine") else ())


def workload_cell(
    system: str, first_token_ms: float, share: float = 0.0, count: int = 100, workload: str = "rag"
) -> WorkloadCell:
    """1000-token prompts at 90 %, one after the other; `share` of each found by the system's host memory."""
    num_found = round(1000 * share)
    tiers = {"host": num_found} if num_found and system == "host" else {}
    answers = tuple(
        answered(first_token_ms + index, 1000, from_outside=num_found, tiers=tiers) for index in range(count)
    )
    return WorkloadCell(system, workload, 90, "large", 0.9, 200_000_000, 7, answers)


def pair_cell(system: str, situation: str, ratio: float) -> PairCell:
    """Six pairs of 100 ms and `ratio` times as much."""
    pairs = tuple((100.0, 100.0 * ratio + index) for index in range(-3, 3))
    return PairCell(system, situation, pairs, pairs)


def lookup_cell(p50_us: float = 100.0) -> LookupCell:
    """Stores at 0.5 and loads at 0.8 of a memcpy."""
    return LookupCell(
        10, 10_000_000, (p50_us,) * 100, (0.02,) * 5, (0.0125,) * 5, Raw("memcpy", NUM_BYTES, (0.01,) * 5)
    )


def run(*cells: Cell) -> CacheRun:
    return CacheRun("baton bench cache", "2026-02-03 04:05 UTC", MACHINE, HEADER, (0,), cells)


def good_run() -> CacheRun:
    """Everything, and nearly all targets reached."""
    return run(
        tier_cell("plain", "", 1000.0),
        tier_cell("prefix", "engine", 50.0),
        tier_cell("host", "host", 60.0),
        tier_cell("disk", "disk", 90.0),
        tier_cell("lmcache", "outside", 80.0),
        workload_cell("plain", 600.0),
        workload_cell("host", 100.0, 0.9),
        workload_cell("plain", 600.0, workload="multi-turn"),
        workload_cell("host", 100.0, 0.9, workload="multi-turn"),
        pair_cell("host", "no reuse", 1.01),
        pair_cell("host", "fits engine", 1.05),
        lookup_cell(),
        SurviveCell("host", (found(70.0, "host"),)),
    )
