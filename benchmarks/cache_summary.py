"""From cells to rows: medians with minimum and maximum, percentiles, shares. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

import msgspec

from benchmarks.cache_results import (
    Answered,
    CacheRun,
    LookupCell,
    PairCell,
    Raw,
    SurviveCell,
    TierCell,
    WorkloadCell,
)
from benchmarks.summary import percentile

SAMPLES_FOR_P99 = 100
_CONFIDENCE = 0.95


class Spread(msgspec.Struct, frozen=True):
    """Of a few samples."""

    median: float
    low: float
    high: float
    count: int


class TierRow(msgspec.Struct, frozen=True):
    """One system with a long prompt. over_floor: warm, as a multiple of vLLM's own prefix cache's; raw_ms: the barest
    read of the same bytes from the same tier; copy_gb_per_s: into the engine, where the system tells
    it, waited_ms: for how long of that the request did not get on."""

    system: str
    prompt_tokens: int
    cold: Spread
    warm: Spread
    step_ms: float
    over_floor: float | None
    copy_gb_per_s: float | None
    waited_ms: float | None
    memcpy_gb_per_s: float | None
    memcpy_ms: float | None
    raw_ms: float | None
    num_problems: int


class WorkloadRow(msgspec.Struct, frozen=True):
    """One system under one workload. p99 only of 100 samples or more. shorter: than without any prefix cache, times.
    saved: the share of prompt tokens that was not computed; hits: by source, the engine's own cache first."""

    system: str
    workload: str
    reuse: int
    size: str
    possible: float
    working_set_bytes: int
    first_token: Spread
    p99_ms: float | None
    shorter: float | None
    tokens_per_s: float
    computed_tokens: int
    saved: float
    hits: dict[str, float]
    num_problems: int


class Interval(msgspec.Struct, frozen=True):
    """A median and its interval from order statistics."""

    median: float
    low: float
    high: float
    count: int


class PairRow(msgspec.Struct, frozen=True):
    """A system's time over vLLM's own, pair by pair: the median ratio and the interval that holds it with 95 %."""

    system: str
    situation: str
    first_token: Interval
    done: Interval
    problem: str


class LookupRow(msgspec.Struct, frozen=True):
    """The arena by itself; rates in GB/s."""

    num_blocks: int
    p50_us: float
    p99_us: float
    store: float
    load: float
    memcpy: float


class SurviveRow(msgspec.Struct, frozen=True):
    """What of the killed engine's prompts another one found."""

    system: str
    found: float
    first_token: Spread


def spread_of(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values), len(values))


def interval_of(values: Sequence[float]) -> Interval:
    """The smallest pair of order statistics, equally far from both ends, that holds the median with 95 %; with fewer
    than six values the whole range."""
    ordered, count = sorted(values), len(values)
    rank, below = 0, 0.0
    while True:
        below += math.comb(count, rank) / 2**count
        if 2 * below > 1 - _CONFIDENCE or rank >= count // 2:
            break
        rank += 1
    at = max(rank - 1, 0)
    return Interval(statistics.median(ordered), ordered[at], ordered[count - 1 - at], count)


def tier_rows(run: CacheRun) -> list[TierRow]:
    """In the order of the run."""
    cells = [cell for cell in run.cells if isinstance(cell, TierCell)]
    floors = {cell.prompt_tokens: first_tokens(cell.warm) for cell in cells if cell.system == "prefix"}
    return [_tier_row(cell, floors.get(cell.prompt_tokens)) for cell in cells]


def workload_rows(run: CacheRun) -> list[WorkloadRow]:
    """By workload, reuse and working set, then in the order of the run."""
    cells = [cell for cell in run.cells if isinstance(cell, WorkloadCell)]
    plain = {_situation(cell): first_tokens(cell.answers) for cell in cells if cell.system == "plain"}
    rows = [_workload_row(cell, plain.get(_situation(cell))) for cell in cells]
    places = list(dict.fromkeys(_situation(cell) for cell in cells))
    return sorted(rows, key=lambda row: places.index((row.workload, row.reuse, row.size)))


def pair_rows(run: CacheRun) -> list[PairRow]:
    return [
        PairRow(cell.system, cell.situation, _ratios(cell.first_token_ms), _ratios(cell.done_ms), cell.problem)
        for cell in run.cells
        if isinstance(cell, PairCell)
    ]


def lookup_rows(run: CacheRun) -> list[LookupRow]:
    rows = []
    for cell in run.cells:
        if isinstance(cell, LookupCell):
            num_bytes = cell.num_blocks * cell.block_bytes
            store, load, memcpy = (
                num_bytes / statistics.median(seconds) / 1e9
                for seconds in (cell.store_s, cell.load_s, cell.memcpy.seconds)
            )
            times = cell.round_trips_us
            row = LookupRow(cell.num_blocks, percentile(times, 0.5), percentile(times, 0.99), store, load, memcpy)
            rows.append(row)
    return rows


def survive_rows(run: CacheRun) -> list[SurviveRow]:
    return [
        SurviveRow(cell.system, _saved(cell.answers), spread_of(first_tokens(cell.answers)))
        for cell in run.cells
        if isinstance(cell, SurviveCell)
    ]


def first_tokens(answers: Iterable[Answered]) -> list[float]:
    """Milliseconds of all."""
    return [answer.first_token_ms for answer in answers]


def plain_step_ms(run: CacheRun) -> float | None:
    """One decode step of plain vLLM after a long prompt."""
    gaps = [
        gap
        for cell in run.cells
        if isinstance(cell, TierCell) and cell.system == "plain"
        for answer in (*cell.cold, *cell.warm)
        for gap in answer.gaps_ms
    ]
    return statistics.median(gaps) if gaps else None


def raw_of(cell: TierCell, name: str) -> Raw | None:
    return next((raw for raw in cell.raws if raw.name == name), None)


def _tier_row(cell: TierCell, floor: list[float] | None) -> TierRow:
    warm = spread_of(first_tokens(cell.warm))
    copies = [answer.load_bytes / answer.load_ms / 1e6 for answer in cell.warm if answer.load_ms > 0]
    memcpy = raw_of(cell, "memcpy")
    barest = next((raw for raw in cell.raws if raw.name != "memcpy"), memcpy)
    memcpy_s = statistics.median(memcpy.seconds) if memcpy else None
    return TierRow(
        system=cell.system,
        prompt_tokens=cell.prompt_tokens,
        cold=spread_of(first_tokens(cell.cold)),
        warm=warm,
        step_ms=statistics.median(gap for answer in cell.warm for gap in answer.gaps_ms),
        over_floor=warm.median / statistics.median(floor) if floor and cell.system != "plain" else None,
        copy_gb_per_s=statistics.median(copies) if copies else None,
        waited_ms=statistics.median(answer.waited_ms for answer in cell.warm) if copies else None,
        memcpy_gb_per_s=memcpy.num_bytes / memcpy_s / 1e9 if memcpy and memcpy_s else None,
        memcpy_ms=memcpy_s * 1e3 if memcpy_s else None,
        raw_ms=statistics.median(barest.seconds) * 1e3 if barest else None,
        num_problems=sum(bool(answer.problem) for answer in (*cell.cold, *cell.warm)),
    )


def _workload_row(cell: WorkloadCell, plain: list[float] | None) -> WorkloadRow:
    times = first_tokens(cell.answers)
    total = sum(answer.prompt_tokens for answer in cell.answers)
    seconds = sum(answer.done_ms for answer in cell.answers) / 1e3
    return WorkloadRow(
        system=cell.system,
        workload=cell.workload,
        reuse=cell.reuse,
        size=cell.size,
        possible=cell.possible,
        working_set_bytes=cell.working_set_bytes,
        first_token=spread_of(times),
        p99_ms=percentile(times, 0.99) if len(times) >= SAMPLES_FOR_P99 else None,
        shorter=statistics.median(plain) / statistics.median(times) if plain else None,
        tokens_per_s=total / seconds,
        computed_tokens=sum(answer.computed for answer in cell.answers),
        saved=_saved(cell.answers),
        hits=_hits(cell.answers, total),
        num_problems=sum(bool(answer.problem) for answer in cell.answers) + bool(cell.problem),
    )


def _hits(answers: Sequence[Answered], total: int) -> dict[str, float]:
    """Shares of all prompt tokens by source; what no tier claims came from outside."""
    tokens: dict[str, int] = {}
    for answer in answers:
        told = dict(answer.tiers)
        rest = answer.from_outside - sum(told.values())
        for source, count in {"engine": answer.from_engine, **told, "outside": max(rest, 0)}.items():
            tokens[source] = tokens.get(source, 0) + count
    return {source: count / total for source, count in tokens.items() if count}


def _saved(answers: Sequence[Answered]) -> float:
    return 1.0 - sum(answer.computed for answer in answers) / sum(answer.prompt_tokens for answer in answers)


def _ratios(pairs: Sequence[tuple[float, float]]) -> Interval:
    return interval_of([having / without for without, having in pairs])


def _situation(cell: WorkloadCell) -> tuple[str, int, str]:
    return cell.workload, cell.reuse, cell.size
