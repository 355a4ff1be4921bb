"""`baton bench handoff` end to end with real engines: that it measures what it says, not how fast."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from benchmarks.handoff import run
from benchmarks.results import Run
from benchmarks.summary import rows_of
from benchmarks.systems import MAX_TOKENS
from cluster.processes import group_members
from cluster.zygote import Zygote

PROMPT_TOKENS = 200


@pytest.mark.engine
@pytest.mark.timeout(300)
def test_a_quick_run_hands_over_all_tokens_but_one_and_writes_both_files(
    zygote: Zygote | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if zygote is None:
        pytest.skip("measures CPU instances")
    out, report = tmp_path / "x.json", tmp_path / "x.md"
    quick = ["--quick", "--prompts", str(PROMPT_TOKENS), "--repeats", "1"]
    assert run([*quick, "--out", str(out), "--markdown", str(report)], zygote) == 0

    measured = msgspec.json.decode(out.read_bytes(), type=Run)
    assert [sample.system for sample in measured.samples] == ["plain", "shm", "zmq"]
    for sample in measured.samples:
        assert sample.problem == ""
        assert sample.first_token_ms > 0
        assert len(sample.gaps_ms) == MAX_TOKENS - 1
    plain, *handed = measured.samples
    assert plain.handover is None
    expected_bytes = -(-(PROMPT_TOKENS - 1) // measured.block_size) * measured.block_size * measured.recipe.token_bytes
    for sample in handed:
        assert sample.handover is not None
        assert sample.handover.tokens == PROMPT_TOKENS - 1
        assert sample.handover.num_bytes == expected_bytes
        assert sample.record["path"]["transport"] == sample.system
    assert [copy.times.num_bytes for copy in measured.copies] == [expected_bytes]

    used = measured.cores
    assert used["plain/decode-0"] == used["shm/prefill-0"] == used["zmq/prefill-0"]
    assert used["shm/decode-0"] == used["zmq/decode-0"]
    assert {len(cores) for cores in used.values()} == {1}

    said = capsys.readouterr()
    assert all(row.is_valid for row in rows_of(measured))
    assert "of memcpy" in said.out
    assert "is ready" in said.err
    assert "## What it means" in report.read_text()
    assert group_members(zygote.pid), "the shared zygote is left running"
