"""From samples to rows and a verdict: percentiles, bandwidth, CPU, shares of a memcpy and of raw libraries. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from benchmarks.summary import Finding, percentile
from benchmarks.transfer_plan import Cell
from benchmarks.transfer_results import Row, Run, Sample
from benchmarks.transfer_systems import MEMCPY

FEWEST_FOR_P99 = 100
LARGE_BYTES = 8_000_000
SHARE_OF_MEMCPY = 0.9
TIMES_NIXL = 1.6
SHARE_OF_RAW = 0.8
PIECE_P50_S = 100e-6
RAW = {"zmq": "pyzmq-raw", "ucx": "ucxx-raw"}
"""What each transport's own library reaches with the same pattern."""


def rows_of(run: Run) -> list[Row]:
    """In the order in which cells, and systems in them, were measured."""
    grouped: dict[Cell, dict[str, list[Sample]]] = {}
    for sample in run.samples:
        grouped.setdefault(sample.cell, {}).setdefault(sample.system, []).append(sample)
    order = list(dict.fromkeys(sample.system for sample in run.samples))
    rows = []
    for cell, by_system in grouped.items():
        yard = _p50(by_system[MEMCPY]) if MEMCPY in by_system else None
        rows += [_row(cell, name, by_system[name], yard) for name in order if name in by_system]
    return rows


def findings_of(rows: Sequence[Row]) -> list[Finding]:
    """What issue 5 expects of one pair, with all layers at once."""
    plain = {(row.system, row.cell): row for row in rows if row.cell.grain == "end" and row.cell.num_pairs == 1}
    large = [cell for (name, cell) in plain if name == MEMCPY and cell.num_bytes > LARGE_BYTES]

    def times(name: str, other: str) -> list[tuple[Cell, float]]:
        """How much faster one is than the other."""
        return [
            (cell, plain[other, cell].p50_s / plain[name, cell].p50_s)
            for cell in large
            if (name, cell) in plain and (other, cell) in plain
        ]

    pieces = [(row.cell, row.p50_s * 1e6) for row in plain.values() if row.system == "shm" and not row.cell.num_blocks]
    text = "of a memcpy's speed or more, over 8 MB"
    found = [
        _finding(f"shm {SHARE_OF_MEMCPY} {text}", times("shm", MEMCPY), lambda value: value >= SHARE_OF_MEMCPY),
        _finding(
            f"shm {TIMES_NIXL} times NIXL, over 8 MB", times("shm", "nixl-raw"), lambda value: value >= TIMES_NIXL
        ),
        _finding(
            f"shm {TIMES_NIXL} times NIXL at its best, over 8 MB",
            times("shm", "nixl-tuned"),
            lambda value: value >= TIMES_NIXL,
        ),
        _finding(
            f"one block of one layer by shm in less than {PIECE_P50_S * 1e6:.0f} us",
            pieces,
            lambda value: value < PIECE_P50_S * 1e6,
        ),
    ]
    return found + [
        _finding(f"{name} {SHARE_OF_RAW} of {raw}, over 8 MB", times(name, raw), lambda value: value >= SHARE_OF_RAW)
        for name, raw in RAW.items()
    ]


def _row(cell: Cell, name: str, samples: Sequence[Sample], yard: float | None) -> Row:
    latencies = [latency for sample in samples for latency in sample.latencies_s]
    p50 = _p50(samples)
    num_bytes = cell.num_bytes * cell.num_pairs
    return Row(
        system=name,
        cell=cell,
        num_samples=len(latencies),
        p50_s=p50,
        p90_s=percentile(latencies, 0.9),
        p99_s=percentile(latencies, 0.99) if len(latencies) >= FEWEST_FOR_P99 else None,
        min_s=min(latencies),
        max_s=max(latencies),
        held_s=statistics.median(sample.held_s for sample in samples),
        gb_per_s=_rate(num_bytes, samples) if cell.grain == "end" else None,
        cpu_s_per_gb=statistics.median(sample.cpu_s for sample in samples) / num_bytes * 1e9,
        of_memcpy=yard / p50 if yard is not None else None,
    )


def _rate(num_bytes: int, samples: Sequence[Sample]) -> float:
    return num_bytes / statistics.median(sample.window_s for sample in samples) / 1e9


def _p50(samples: Sequence[Sample]) -> float:
    return statistics.median(latency for sample in samples for latency in sample.latencies_s)


def _finding(text: str, values: Sequence[tuple[Cell, float]], is_met: Callable[[float], bool]) -> Finding:
    if not values:
        return Finding(f"{text}: not measured", None)
    low, high = (each(values, key=lambda pair: pair[1]) for each in (min, max))
    places = [f"{value:.2f} ({cell.model}, {cell.num_bytes / 1e6:,.2f} MB)" for cell, value in (low, high)]
    num_met = sum(is_met(value) for _, value in values)
    shown = " to ".join(places if len(values) > 1 else places[:1])
    return Finding(f"{text}: {shown}; so at {num_met} of {len(values)} payloads", num_met == len(values))
