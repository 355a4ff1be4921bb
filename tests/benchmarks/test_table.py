"""What a reader sees: aligned text, Markdown with the same cells, and where the file goes."""

from __future__ import annotations

from pathlib import Path

import msgspec

from benchmarks.machine import cpu_model, has_fast_bfloat16
from benchmarks.report import file_name, markdown, problem_lines
from benchmarks.summary import rows_of
from benchmarks.table import HEADER, markdown_table, memcpy_lines, part_lines, setting_lines, text_table
from tests.benchmarks.runs import MACHINE, good_run, record, run, sample


def test_every_column_of_the_text_table_is_aligned() -> None:
    lines = text_table(rows_of(good_run())).splitlines()
    ends = {line.rstrip().rfind("3/3") for line in lines[3:]}
    assert len(ends) == 1
    assert "last layer to Landed" in lines[0]
    assert lines[4].split()[:7] == ["2048", "shm", "1015.0", "1010.0", "20.0", "+15.0", "+0.75"]


def test_a_row_that_is_not_valid_says_so_in_both_tables() -> None:
    rows = rows_of(run(sample("plain", 1000.0), sample("shm", 1.0, record=record({"handed_over": 0}))))
    assert "0/1 NOT VALID" in text_table(rows)
    assert "0/1 NOT VALID" in markdown_table(rows)


def test_the_markdown_table_names_each_column_with_its_group() -> None:
    header, rule, *body = markdown_table(rows_of(good_run())).splitlines()
    assert "first token, median ms" in header
    assert "first token, min ms" in header
    assert header.count("|") == rule.count("|") == body[0].count("|") == len(HEADER) + 1
    assert len(body) == 3


def test_the_results_file_has_command_versions_cores_table_and_verdict() -> None:
    text = markdown(good_run())
    said = ("baton bench handoff --repeats 3", "vLLM 0.32.0", "torch 2.13.0+cpu", "plain/decode-0: 0", "12.5 GB/s cold")
    for words in (*said, "max_num_batched_tokens 2048", "as expected: shm writes", "28.7 kB of KV per token"):
        assert words in text, words
    assert "not quiet" not in text


def test_a_loud_machine_and_invalid_samples_are_confessed() -> None:
    bad = run(sample("plain", 1000.0), sample("shm", 1.0, record=record({"handed_over": 0})))
    text = markdown(msgspec.structs.replace(bad, machine=msgspec.structs.replace(MACHINE, load=2.5)))
    assert "the machine was not quiet: load average 2.50" in text
    assert "FALLS SHORT: not valid: shm, 2048 tokens" in text
    assert problem_lines(bad)[0].startswith("NOT VALID: shm, 2048 tokens, repeat 1: 0 of 2047 tokens")


def test_a_folder_gets_a_file_named_after_theme_hardware_and_date(tmp_path: Path) -> None:
    assert file_name(good_run(), tmp_path) == tmp_path / "handoff_amd-epyc-2-cores_2026-02-03.md"
    assert file_name(good_run(), tmp_path / "x.md") == tmp_path / "x.md"


def test_the_yardstick_and_the_cores_have_a_line() -> None:
    assert memcpy_lines(good_run()) == [
        "memcpy of 2048 tokens' blocks (100.0 MB): 12.5 GB/s cold (8.0 ms), 20.0 with a warm source, "
        "12.8 cold in whole runs"
    ]
    assert setting_lines(good_run())[0] == "engine cores: plain/decode-0: 0; shm/prefill-0: 0; shm/decode-0: 1"


def test_the_parts_of_a_handoff_are_told_as_far_as_they_are_known() -> None:
    assert part_lines(rows_of(good_run()))[0] == (
        "shm, 2048 tokens: 10.0 ms inside the writes, 1.0 ms more for the digest, 1.0 ms from Landed leaving P, "
        "0.50 ms of which D's check, 25.0 ms from Landed to the first token"
    )


def test_processors_are_named_and_judged_by_what_the_kernel_says() -> None:
    epyc = "model name\t: AMD EPYC\ncpu family\t: 23\nmodel\t\t: 1\nflags\t\t: fpu avx2\n"
    xeon = "model name\t: Intel(R) Xeon(R) Platinum 8488C\nflags\t\t: fpu avx2 avx512f amx_bf16\n"
    assert cpu_model(epyc) == "AMD EPYC (family 23 model 1)"
    assert cpu_model(xeon) == "Intel(R) Xeon(R) Platinum 8488C"
    assert not has_fast_bfloat16(epyc)
    assert has_fast_bfloat16(xeon)
    assert msgspec.structs.replace(MACHINE, cpu=cpu_model(xeon)).hardware == "intel-xeon-platinum-8488c-2-cores"
