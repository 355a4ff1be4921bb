"""The tables of `baton bench cache`, for a terminal and for a results file, and the sentences below them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from benchmarks.cache_results import CacheRun
from benchmarks.cache_summary import (
    Interval,
    Spread,
    TierRow,
    WorkloadRow,
    lookup_rows,
    pair_rows,
    survive_rows,
    tier_rows,
    workload_rows,
)
from benchmarks.workloads import NO_SIZE


class Table(msgspec.Struct, frozen=True):
    """A title, one line of names, and rows of text."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def text(self) -> str:
        """For a terminal: columns as wide as they must be."""
        grid = [self.header, *self.rows]
        widths = [max(len(line[index]) for line in grid) for index in range(len(self.header))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in grid]
        lines.insert(1, "-" * max(map(len, lines)))
        return "\n".join([self.title, *lines])

    def markdown(self) -> str:
        lines = [f"| {' | '.join(self.header)} |", "|" + "---|" * len(self.header)]
        return "\n".join(lines + [f"| {' | '.join(row)} |" for row in self.rows])


def tables_of(run: CacheRun) -> list[Table]:
    """Those that have rows."""
    tables = [_tiers(run), _workloads(run), _overhead(run), _arena(run), _survive(run)]
    return [table for table in tables if table.rows]


def problem_lines(run: CacheRun) -> list[str]:
    """What did not come from where it should have, cell by cell."""
    lines = []
    for cell in run.cells:
        answers = [*getattr(cell, "cold", ()), *getattr(cell, "warm", ()), *getattr(cell, "answers", ())]
        told = [answer.problem for answer in answers if answer.problem] + [getattr(cell, "problem", "")]
        lines += [
            f"NOT VALID: {cell.key}: {problem} ({told.count(problem)} of {max(len(answers), 1)})"
            for problem in dict.fromkeys(filter(None, told))
        ]
    return lines


def _tiers(run: CacheRun) -> Table:
    header = (
        "system",
        "computed, ms",
        "found, ms",
        "of vLLM's own hit",
        "decode step, ms",
        "copy into the engine, GB/s",
        "waited for it, ms",
        "memcpy, GB/s",
        "barest read, ms",
    )
    rows = tuple(_tier_cells(row) for row in tier_rows(run))
    return Table(f"First token of {run.header.prompt_tokens:,} tokens, median (minimum to maximum)", header, rows)


def _tier_cells(row: TierRow) -> tuple[str, ...]:
    return (
        row.system,
        _spread(row.cold, 0),
        _spread(row.warm, 0),
        _number(row.over_floor, 2),
        _number(row.step_ms, 1),
        _number(row.copy_gb_per_s, 2),
        _number(row.waited_ms, 1),
        _number(row.memcpy_gb_per_s, 2),
        _number(row.raw_ms, 0),
    )


def _workloads(run: CacheRun) -> Table:
    header = (
        "workload",
        "reuse",
        "working set",
        "system",
        "first token p50, ms",
        "p99",
        "shorter, times",
        "prompt tokens/s",
        "computed",
        "saved",
        "hits",
    )
    rows = tuple(_workload_cells(row) for row in workload_rows(run))
    return Table("Workloads, one client: p50 (minimum to maximum)", header, rows)


def _workload_cells(row: WorkloadRow) -> tuple[str, ...]:
    return (
        row.workload,
        f"{row.possible:.0%}",
        f"{row.working_set_bytes / 1e6:.0f} MB" + ("" if row.size == NO_SIZE else f", {row.size}"),
        row.system,
        _spread(row.first_token, 0),
        _number(row.p99_ms, 0),
        _number(row.shorter, 1),
        f"{row.tokens_per_s:,.0f}",
        f"{row.computed_tokens:,}",
        f"{row.saved:.0%}",
        ", ".join(f"{source} {share:.0%}" for source, share in row.hits.items()) or "-",
    )


def _overhead(run: CacheRun) -> Table:
    header = ("system", "where the cache gives nothing", "pairs", "first token", "whole answer")
    rows = tuple(
        (row.system, row.situation, str(row.done.count), _interval(row.first_token), _interval(row.done))
        for row in pair_rows(run)
    )
    return Table("Time over vLLM's own prefix cache alone, median of pairs (95 % interval)", header, rows)


def _arena(run: CacheRun) -> Table:
    header = ("blocks", "look-up p50, ms", "p99", "store, GB/s", "of memcpy", "load, GB/s", "of memcpy", "memcpy, GB/s")
    rows = tuple(
        (
            str(row.num_blocks),
            _number(row.p50_us / 1e3, 3),
            _number(row.p99_us / 1e3, 3),
            _number(row.store, 2),
            _number(row.store / row.memcpy, 2),
            _number(row.load, 2),
            _number(row.load / row.memcpy, 2),
            _number(row.memcpy, 2),
        )
        for row in lookup_rows(run)
    )
    return Table("The arena by itself, without an engine", header, rows)


def _survive(run: CacheRun) -> Table:
    rows = tuple((row.system, f"{row.found:.0%}", _spread(row.first_token, 0)) for row in survive_rows(run))
    return Table("After kill -9 of the engine that stored", ("system", "tokens found", "first token, ms"), rows)


def _spread(spread: Spread, digits: int) -> str:
    return f"{spread.median:,.{digits}f} ({spread.low:,.{digits}f} to {spread.high:,.{digits}f})"


def _interval(interval: Interval) -> str:
    return f"{interval.median - 1:+.1%} ({interval.low - 1:+.1%} to {interval.high - 1:+.1%})"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def setting_lines(run: CacheRun, corpus: str) -> Sequence[str]:
    """What makes the systems comparable."""
    recipe = run.header.recipe
    shape = recipe.shape
    return [
        f"{shape.like} in {recipe.dtype}: {recipe.token_bytes / 1e3:.1f} kB of KV per token, dummy weights, "
        f"max_num_batched_tokens {recipe.max_num_batched_tokens}, block size 128",
        f"every engine computes on core {', '.join(map(str, run.cores))} alone and is asked through the same proxy by "
        "one client; servers, proxy and client run wherever the system puts them",
        f"text of the workloads: {corpus}",
    ]
