"""Statistics, findings, tables and the picture over runs whose answers are known."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.cache_findings import findings_of
from benchmarks.cache_report import file_name, markdown, picture_of
from benchmarks.cache_summary import interval_of, lookup_rows, survive_rows, tier_rows, workload_rows
from benchmarks.cache_table import problem_lines, tables_of
from benchmarks.engine_counters import EngineCounters, parsed
from benchmarks.picture import Group, Mark, svg
from tests.benchmarks.cache_runs import found, good_run, lookup_cell, pair_cell, run, tier_cell, workload_cell


def test_a_tier_is_compared_with_vllms_own_hit_and_the_barest_read() -> None:
    rows = {row.system: row for row in tier_rows(good_run())}
    host, disk = rows["host"], rows["disk"]
    assert (host.warm.median, host.warm.low, host.warm.high) == (60.0, 59.0, 69.0)
    assert host.over_floor == pytest.approx(1.2)
    assert [host.memcpy_ms, host.raw_ms] == pytest.approx([10.0, 10.0])
    assert disk.raw_ms == pytest.approx(20.0)
    assert host.copy_gb_per_s == pytest.approx(5.0)
    assert host.waited_ms == 2.0
    assert rows["lmcache"].copy_gb_per_s is None, "it does not tell"
    assert rows["lmcache"].waited_ms is None
    assert rows["plain"].over_floor is None


def test_a_workload_says_what_was_saved_where_it_was_found_and_how_much_shorter_it_was() -> None:
    plain, host = workload_rows(run(workload_cell("plain", 600.0), workload_cell("host", 100.0, 0.9)))
    assert host.shorter == pytest.approx(649.5 / 149.5)
    assert host.saved == pytest.approx(0.9)
    assert host.computed_tokens == 10_000
    assert host.hits == {"host": pytest.approx(0.9)}
    assert plain.saved == 0.0
    assert host.tokens_per_s == pytest.approx(100 * 1000 / (100 * 0.2095))


def test_p99_is_told_of_a_hundred_samples_and_not_of_fewer() -> None:
    enough, few = workload_rows(run(workload_cell("host", 100.0), workload_cell("disk", 100.0, count=99)))
    assert enough.p99_ms == pytest.approx(198.01)
    assert few.p99_ms is None


def test_a_hit_that_no_tier_claims_came_from_outside() -> None:
    (row,) = workload_rows(run(workload_cell("lmcache", 100.0, 0.5)))
    assert row.hits == {"outside": 0.5}


@given(st.lists(st.floats(0.5, 2.0), min_size=6, max_size=40))
def test_the_interval_holds_the_median_with_95_percent(values: list[float]) -> None:
    interval, ordered = interval_of(values), sorted(values)
    assert interval.low <= interval.median <= interval.high
    low = next(index for index, value in enumerate(ordered) if value == interval.low)
    misses = 2 * sum(math.comb(len(values), k) for k in range(low + 1)) / 2 ** len(values)
    assert misses <= 0.05 or low == 0


def test_of_twelve_pairs_the_third_and_tenth_hold_the_median() -> None:
    interval = interval_of([float(value) for value in range(1, 13)])
    assert (interval.low, interval.median, interval.high) == (3.0, 6.5, 10.0)


def test_every_target_is_reached_or_said_to_fall_short() -> None:
    found_by_text = {finding.text: finding.met for finding in findings_of(good_run())}

    def met(beginning: str) -> bool | None:
        (value,) = [value for text, value in found_by_text.items() if text.startswith(beginning)]
        return value

    assert met("host ahead of LMCache")
    assert met("host within 1.3 times")
    assert met("disk within 2 times")
    assert not met("host: first token less a decode step within"), "40 ms against 1.5 * 10 + 5"
    assert not met("host: first token less a decode step of the same answers within"), "40 ms, too"
    assert not met("disk: first token less a decode step within"), "70 ms against 1.5 * 20"
    assert met("at most +2% time where the cache gives nothing (no reuse")
    assert not met("at most +2% time where the cache gives nothing (fits engine")
    assert met("a look-up's round trip")
    assert met("loads from the arena")
    assert not met("stores into the arena")
    assert met("rag at 90 % reuse"), "4.3 times of 3"
    assert not met("multi-turn at 90 % reuse: first token 5 times"), "4.3 times of 5"
    assert met("multi-turn at 90 % reuse: at least 60% of prefill saved")
    assert met("host: after kill -9")
    assert met("every sample came from where")


def test_what_was_not_measured_is_not_judged() -> None:
    assert [finding.text for finding in findings_of(run(lookup_cell(300.0)))][1].startswith("a look-up's")
    assert findings_of(run(lookup_cell(300.0)))[1].met is False
    assert len(findings_of(run())) == 1


def test_a_sample_from_elsewhere_is_printed_and_spoils_the_first_finding() -> None:
    bad = run(tier_cell("disk", "disk", 90.0, problem="3968 from host, instead of 3968 from disk"))
    assert problem_lines(bad) == ["NOT VALID: tiers/disk/4000: 3968 from host, instead of 3968 from disk (3 of 6)"]
    assert findings_of(bad)[0].met is False
    assert problem_lines(good_run()) == []


def test_tables_have_a_row_per_cell_and_the_file_names_what_it_was_made_with(tmp_path: Path) -> None:
    titles = {table.title.split(",")[0]: table for table in tables_of(good_run())}
    assert [len(table.rows) for table in titles.values()] == [5, 4, 2, 1, 1]
    first = tables_of(good_run())[0]
    widths = {len(line) for line in first.text().splitlines()[1:]}
    assert len(widths) == 1
    text = markdown(good_run(), "cache.svg", 2176)
    for words in (
        "baton bench cache",
        "vLLM 0.32.0",
        "![first tokens](cache.svg)",
        "not LMCache's figures on a GPU",
        "2,176",
    ):
        assert words in text
    assert "FALLS SHORT: stores into the arena" in text
    assert file_name(good_run(), tmp_path) == tmp_path / "cache_amd-epyc-2-cores_2026-02-03.md"


def test_the_picture_is_a_drawing_with_a_bar_per_system() -> None:
    drawing = ElementTree.fromstring(picture_of(good_run()))
    space = "{http://www.w3.org/2000/svg}"
    bars = drawing.findall(f"{space}rect")[1:]
    assert len(bars) == 4 + 2 + 2, "found prompts of all but plain, and two systems in two workloads"
    assert all(0 < float(bar.attrib["width"]) <= 860 for bar in bars)


def test_names_in_the_picture_are_escaped_and_longer_is_longer() -> None:
    drawing = ElementTree.fromstring(svg("a < b", "ms", [Group("g", (Mark("x&y", 1, 1, 1), Mark("z", 3, 2, 4)))]))
    space = "{http://www.w3.org/2000/svg}"
    one, other = (float(bar.attrib["width"]) for bar in drawing.findall(f"{space}rect")[1:])
    assert other == pytest.approx(3 * one, rel=0.01)
    assert "x&y" in [text.text for text in drawing.findall(f"{space}text")]


def test_the_arena_and_the_survivors_have_rows() -> None:
    (row,) = lookup_rows(good_run())
    assert [row.store, row.load, row.memcpy] == pytest.approx([5.0, 8.0, 10.0])
    (survivor,) = survive_rows(good_run())
    assert survivor.found == pytest.approx(0.992)


def test_the_engines_counters_are_summed_over_labels() -> None:
    text = (
        '# HELP vllm:prompt_tokens_total x\nvllm:prompt_tokens_total{engine="0"} 100.0\n'
        'vllm:prompt_tokens_total{engine="1"} 1e3\nvllm:prefix_cache_hits_total{engine="0"} 32.0\n'
        'vllm:prefix_cache_queries_total{engine="0"} 7.0\n'
    )
    assert parsed(text) == EngineCounters(1100, 32, 0)
    assert parsed(text).since(EngineCounters(100, 2, 0)) == EngineCounters(1000, 30, 0)


def test_pairs_are_ratios_and_one_bad_pair_is_told() -> None:
    assert found(1.0, "host").computed == 32
    bad = pair_cell("host", "no reuse", 1.0)
    assert problem_lines(run(bad)) == []
