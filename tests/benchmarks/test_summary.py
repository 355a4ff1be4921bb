"""Statistics and verdict over runs whose answers are known."""

from __future__ import annotations

import msgspec
import pytest

from benchmarks.results import Run, handover_of, problem_of
from benchmarks.summary import Row, findings_of, percentile, rows_of
from tests.benchmarks.runs import good_run, record, run, sample


def row_of(measured: Run, system: str) -> Row:
    return next(row for row in rows_of(measured) if row.system == system)


def test_first_tokens_are_compared_by_their_medians_in_milliseconds_and_decode_steps() -> None:
    row = row_of(good_run(), "shm")
    assert (row.first_token_ms, row.first_token_min_ms, row.step_ms) == (1015.0, 1010.0, 20.0)
    assert (row.over_ms, row.over_steps) == (15.0, 0.75)
    assert row_of(good_run(), "plain").over_ms is None


def test_the_rate_of_shm_is_a_share_of_the_memcpys() -> None:
    row = row_of(good_run(), "shm")
    assert row.gb_per_s == pytest.approx(10.0)
    assert row.share == pytest.approx(0.8)
    assert row.share_warm == pytest.approx(0.5)


def test_a_transport_that_writes_in_the_background_has_no_rate_of_writing() -> None:
    row = row_of(good_run(), "zmq")
    assert row.gb_per_s is None
    assert row.window_gb_per_s == pytest.approx(0.1)


def test_the_time_after_the_last_layer_is_told_in_parts() -> None:
    row = row_of(good_run(), "shm")
    assert (row.tail_ms, row.sent_tail_ms, row.check_ms) == (2.5, 1.0, 0.5)
    assert row.computed_tail_ms is None
    assert (row.write_ms, row.digest_ms, row.landed_to_first_ms) == (10.0, 1.0, 25.0)


def test_a_record_that_does_not_tell_the_last_layer_leaves_it_open() -> None:
    silent = record()
    del silent["moments_ms"]["last_layer"]
    measured = run(sample("plain", 1000.0), sample("shm", 1010.0, record=silent))
    assert row_of(measured, "shm").tail_ms is None
    assert [finding.met for finding in findings_of(rows_of(measured))] == [True, None, True]


def test_everything_as_expected_is_said() -> None:
    findings = findings_of(rows_of(good_run()))
    assert [finding.met for finding in findings] == [True, True, True]
    assert "0.80 at 2048" in findings[0].text


def test_each_expectation_falls_short_by_itself() -> None:
    slow, late = record(), record()
    slow["prefill"]["copy_s"] = 0.0101
    late["moments_ms"]["last_layer"] = 1046.9
    short = {
        0: run(sample("plain", 1000.0), sample("shm", 1010.0, record=slow)),
        1: run(sample("plain", 1000.0), sample("shm", 1010.0, record=late)),
        2: run(sample("plain", 1000.0), sample("shm", 1021.0)),
    }
    for index, measured in short.items():
        assert [finding.met for finding in findings_of(rows_of(measured))] == [at != index for at in range(3)]


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ({"handed_over": 2000}, "2000 of 2047 tokens were handed over"),
        ({"handed_over": 0, "computed": 2048}, "0 of 2047 tokens were handed over"),
        ({"computed": 2}, "decode computed 2"),
        ({"found_locally": 128}, "found 128 tokens"),
    ],
)
def test_a_sample_that_was_not_handed_over_does_not_count(tokens: dict[str, int], said: str) -> None:
    bad = sample("shm", 10.0, record=record(tokens))
    assert said in bad.problem
    row = row_of(run(sample("plain", 1000.0), sample("shm", 1010.0), bad), "shm")
    assert (row.num_valid, row.num_samples, row.is_valid) == (1, 2, False)
    assert row.first_token_ms == 1010.0


def test_a_run_with_an_invalid_row_says_so_first() -> None:
    bad = sample("shm", 10.0, record=record({"handed_over": 0}))
    finding = findings_of(rows_of(run(sample("plain", 1000.0), bad)))[0]
    assert (finding.text, finding.met) == ("not valid: shm, 2048 tokens", False)


def test_the_transport_and_the_end_of_a_request_are_checked() -> None:
    assert problem_of(record(transport="zmq"), "shm", 2048) == "went over zmq"
    assert problem_of(record() | {"status": "cancelled"}, "shm", 2048) == "status cancelled"
    assert problem_of({"status": "done"}, "", 2048) == ""
    assert handover_of({"status": "done", "prefill": None}) is None


def test_percentiles_lie_between_neighbours() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([0.0, 10.0], 0.9) == pytest.approx(9.0)
    assert percentile([7.0], 0.9) == 7.0


def test_a_run_survives_its_json() -> None:
    measured = good_run()
    assert msgspec.json.decode(msgspec.json.encode(measured), type=Run) == measured
