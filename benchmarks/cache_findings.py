"""What was aimed at and what became of it: one sentence per target, with the figures. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.cache_results import CacheRun
from benchmarks.cache_summary import (
    LookupRow,
    PairRow,
    SurviveRow,
    TierRow,
    WorkloadRow,
    lookup_rows,
    pair_rows,
    plain_step_ms,
    survive_rows,
    tier_rows,
    workload_rows,
)
from benchmarks.part_overhead import NO_REUSE
from benchmarks.summary import Finding

OVER_FLOOR = {"host": 1.3, "disk": 2.0, "redis": 3.0, "peer": 3.0}
OF_RAW = 1.5
MORE_MS = 5.0
OVERHEAD = 1.02
OF_MEMCPY = 0.7
LOOKUP_US = 200.0
SAVED = 0.6
SHORTER = {"multi-turn": 5.0, "rag": 3.0, "summary": 4.0, "code": 2.0}
"""Times shorter than without a prefix cache."""


def findings_of(run: CacheRun) -> list[Finding]:
    """All that the run can say something about."""
    tiers = {row.system: row for row in tier_rows(run)}
    found = [_problems(run)]
    found += _beside_lmcache(tiers)
    found += _over_floor(tiers)
    found += _beside_raw(tiers, plain_step_ms(run))
    found += [_overhead(row) for row in pair_rows(run) if row.system == "host"]
    for row in lookup_rows(run):
        found += _lookup(row)
    found += _workloads(workload_rows(run))
    found += [_survive(row) for row in survive_rows(run)]
    return found


def _problems(run: CacheRun) -> Finding:
    tiers, workloads = tier_rows(run), workload_rows(run)
    count = sum(row.num_problems for row in tiers) + sum(row.num_problems for row in workloads)
    count += sum(bool(row.problem) for row in pair_rows(run))
    return Finding(f"every sample came from where its system claims to have it: {count} did not", count == 0)


def _beside_lmcache(tiers: dict[str, TierRow]) -> list[Finding]:
    found = []
    for ours, theirs in (("host", "lmcache"), ("disk", "lmcache-disk"), ("redis", "lmcache-redis")):
        if ours in tiers and theirs in tiers:
            left, right = tiers[ours].warm.median, tiers[theirs].warm.median
            text = f"{ours} ahead of LMCache (its CPU fallback): first token {left:.0f} against {right:.0f} ms"
            found.append(Finding(text, left < right))
    return found


def _over_floor(tiers: dict[str, TierRow]) -> list[Finding]:
    found = []
    for system, most in OVER_FLOOR.items():
        row = tiers.get(system)
        if row is not None and row.over_floor is not None:
            text = f"{system} within {most:g} times vLLM's own prefix cache: {row.over_floor:.2f} times"
            found.append(Finding(text, row.over_floor <= most))
    return found


def _beside_raw(tiers: dict[str, TierRow], step_ms: float | None) -> list[Finding]:
    """What a hit costs beyond the step that computes a token: plain vLLM's, the one that was measured in the same
    minutes, since machines are not equally fast all the time, and that of a hit which moves nothing."""
    found = []
    for system in OVER_FLOOR:
        row = tiers.get(system)
        if row is None or row.raw_ms is None or step_ms is None:
            continue
        most = OF_RAW * row.raw_ms + (MORE_MS if system == "host" else 0.0)
        name = "memcpy + 5 ms" if system == "host" else "the raw read"
        subtrahends = (
            (step_ms, "a decode step"),
            (row.step_ms, "a decode step of the same answers"),
            (_own_hit_ms(tiers), "vLLM's own hit"),
        )
        for less, of in subtrahends:
            if less is not None:
                rest = row.warm.median - less
                text = f"{system}: first token less {of} within {OF_RAW} times {name}: {rest:.0f} of {most:.0f} ms"
                found.append(Finding(text, rest <= most))
    return found


def _own_hit_ms(tiers: dict[str, TierRow]) -> float | None:
    """The engine's own cache moves nothing, so what it takes beyond a decode step no other cache can avoid."""
    return tiers["prefix"].warm.median if "prefix" in tiers else None


def _overhead(row: PairRow) -> Finding:
    ratio = row.done if row.situation == NO_REUSE else row.first_token
    of = "whole answers" if row.situation == NO_REUSE else "first tokens"
    return Finding(
        f"at most {OVERHEAD - 1:+.0%} time where the cache gives nothing ({row.situation}, {of}): "
        f"{ratio.median - 1:+.1%}, interval {ratio.low - 1:+.1%} to {ratio.high - 1:+.1%}",
        ratio.median <= OVERHEAD,
    )


def _lookup(row: LookupRow) -> list[Finding]:
    load, store = row.load / row.memcpy, row.store / row.memcpy
    return [
        Finding(
            f"a look-up's round trip under 0.2 ms: {row.p50_us / 1e3:.3f} ms, p99 {row.p99_us / 1e3:.3f}",
            row.p50_us < LOOKUP_US,
        ),
        Finding(f"loads from the arena at {OF_MEMCPY} of a memcpy or more: {load:.2f}", load >= OF_MEMCPY),
        Finding(f"stores into the arena at {OF_MEMCPY} of a memcpy or more: {store:.2f}", store >= OF_MEMCPY),
    ]


def _workloads(rows: Sequence[WorkloadRow]) -> list[Finding]:
    found = []
    most = max((row.reuse for row in rows), default=0)
    for workload, least in SHORTER.items():
        row = _host_row(rows, workload, most)
        if row is None or not most:
            continue
        if row.shorter is not None:
            text = (
                f"{workload} at {most} % reuse: first token {least:g} times shorter than without a prefix cache or more"
            )
            found.append(Finding(f"{text}: {row.shorter:.1f} times", row.shorter >= least))
        if workload == "multi-turn":
            text = f"multi-turn at {most} % reuse: at least {SAVED:.0%} of prefill saved: {row.saved:.0%}"
            found.append(Finding(text, row.saved >= SAVED))
    return found


def _host_row(rows: Sequence[WorkloadRow], workload: str, reuse: int) -> WorkloadRow | None:
    """Baton's host memory, with more than the engine's cache holds."""
    wanted = ("host", workload, reuse, "large")
    return next((row for row in rows if (row.system, row.workload, row.reuse, row.size) == wanted), None)


def _survive(row: SurviveRow) -> Finding:
    text = f"{row.system}: after kill -9 of the engine another one finds what it stored: {row.found:.0%} of the tokens"
    return Finding(text, row.found > 0.9)
