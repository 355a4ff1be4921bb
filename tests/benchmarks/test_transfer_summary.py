"""Rows and verdict of `baton bench transfer` on numbers that one can check in the head."""

from __future__ import annotations

import pytest

from benchmarks.transfer_plan import Cell, Sweep
from benchmarks.transfer_results import Run, Sample
from benchmarks.transfer_summary import findings_of, rows_of
from tests.benchmarks.runs import MACHINE

SWEEP = Sweep((0, 100), ("end",), (1,), 16, 1 << 30)
LARGE = Cell("llama-3-8b", 100, 32, 200_000_000, "end", 1, 100)
PIECE = Cell("llama-3-8b", 0, 1, 65_536, "end", 1, 100)


def sample(system: str, latency_s: float, cell: Cell = LARGE, cpu_s: float = 0.1) -> Sample:
    return Sample(system, cell, (latency_s,) * cell.num_pairs, latency_s, latency_s / 2, cpu_s)


def run_of(*samples: Sample) -> Run:
    return Run("baton bench transfer", "2026-01-01 00:00 UTC", MACHINE, {}, SWEEP, samples, (), ())


def test_a_row_has_medians_bandwidth_cpu_and_the_share_of_a_memcpy() -> None:
    samples = [sample("memcpy", seconds) for seconds in (0.02, 0.01, 0.05)]
    samples += [sample("shm", seconds, cpu_s=0.4) for seconds in (0.025, 0.1, 0.02)]
    memcpy, shm = rows_of(run_of(*samples))
    assert (shm.p50_s, shm.min_s, shm.max_s, shm.held_s) == (0.025, 0.02, 0.1, 0.0125)
    assert shm.gb_per_s == pytest.approx(8.0)
    assert shm.cpu_s_per_gb == pytest.approx(2.0)
    assert shm.of_memcpy == pytest.approx(0.8)
    assert memcpy.of_memcpy == 1.0
    assert shm.p99_s is None


def test_p99_needs_a_hundred_samples() -> None:
    assert rows_of(run_of(*(sample("shm", 0.01 * index) for index in range(1, 101))))[0].p99_s == pytest.approx(0.9901)


def test_several_pairs_share_the_bandwidth_of_their_common_window() -> None:
    cell = Cell("llama-3-8b", 100, 32, 200_000_000, "end", 2, 7)
    moved = Sample("shm", cell, (0.1, 0.3), 0.4, 0.1, 0.8)
    row = rows_of(run_of(moved))[0]
    assert row.gb_per_s == pytest.approx(1.0)
    assert row.cpu_s_per_gb == pytest.approx(2.0)
    assert row.p50_s == pytest.approx(0.2)


def test_the_verdict_compares_with_memcpy_nixl_and_the_raw_library() -> None:
    run = run_of(
        sample("memcpy", 0.095),
        sample("shm", 0.1),
        sample("zmq", 0.5),
        sample("nixl-raw", 0.17),
        sample("pyzmq-raw", 0.3),
        sample("shm", 99e-6, PIECE),
        sample("zmq", 99e-6, PIECE),
    )
    said = {finding.text.partition(",")[0].partition(":")[0]: finding.met for finding in findings_of(rows_of(run))}
    assert said == {
        "shm 0.9 of a memcpy's speed or more": True,
        "shm 1.6 times NIXL": True,
        "shm 1.6 times NIXL at its best": None,
        "one block of one layer by shm in less than 100 us": True,
        "zmq 0.8 of pyzmq-raw": False,
        "ucx 0.8 of ucxx-raw": None,
    }


def test_layer_by_layer_and_small_payloads_do_not_count_for_the_verdict() -> None:
    layered = Cell("llama-3-8b", 100, 32, 200_000_000, "layer", 1, 7)
    rows = rows_of(
        run_of(*(sample(name, 0.1, cell) for cell in (layered, PIECE) for name in ("memcpy", "zmq", "pyzmq-raw")))
    )
    assert [finding.met for finding in findings_of(rows)] == [None] * 6
