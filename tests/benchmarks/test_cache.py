"""`baton bench cache` end to end with real engines: that it measures what it says, not how fast; and that a finished
cell is not measured again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from benchmarks import part_lookup, part_overhead, part_survive, part_tiers, part_workloads
from benchmarks.bar import Bar
from benchmarks.bench import Bench
from benchmarks.cache import run
from benchmarks.cache_options import parse
from benchmarks.cache_results import (
    CacheRun,
    Cell,
    State,
    SurviveCell,
    TierCell,
    WorkloadCell,
)
from benchmarks.corpus import read_corpus
from benchmarks.site import Site
from cluster.processes import group_members
from cluster.zygote import Zygote
from core.clock import ManualClock
from tests.benchmarks.cache_runs import HEADER, found, lookup_cell, pair_cell, tier_cell
from tests.benchmarks.runs import MACHINE

PROMPT_TOKENS = 300
FOUND_TOKENS = 256
SMALL = ["--systems", "plain,prefix,host", "--workloads", "rag", "--reuse", "75", "--sizes", "large", "--quick"]


class _NoSite:
    """Nothing can be started here."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was asked for: something is measured again")


def test_what_an_earlier_run_has_finished_is_not_measured_again() -> None:
    options = parse([*SMALL, "--prompt", "4000"], False)
    state = State(None, HEADER)
    cells: list[Cell] = [lookup_cell(), SurviveCell("host", (found(1.0, "host"),))]
    cells += [tier_cell(system.name, "", 1.0) for system in options.systems]
    cells += [pair_cell("host", situation, 1.0) for situation in part_overhead.SITUATIONS]
    cells += [WorkloadCell(system.name, "rag", 75, "large", 0.7, 1, 7, ()) for system in options.systems]
    for cell in cells:
        state.add(cell)
    site = cast(Site, _NoSite())
    bar = Bar(sys.stderr, ManualClock(), 0.0)
    bench = Bench(options, site, state, bar, ManualClock(), MACHINE, read_corpus(None))
    parts = (part_tiers, part_workloads, part_overhead, part_lookup, part_survive)
    bar.expect(sum(part.weight(bench) for part in parts))
    for part in parts:
        part.measure(bench)
    assert "100%" in bar.line(""), "every weight that was announced was counted"


@pytest.mark.engine
@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_small_run_finds_in_each_tier_what_it_stored_and_writes_its_files(
    zygote: Zygote | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if zygote is None:
        pytest.skip("measures CPU instances")
    out, report, state = tmp_path / "x.json", tmp_path / "x.md", tmp_path / "state"
    files = ["--out", str(out), "--markdown", str(report), "--state", str(state)]
    few = ["--prompt", str(PROMPT_TOKENS), "--repeats", "1", "--requests", "8", "--parts", "tiers,workloads,survive"]
    assert run([*SMALL, *few, *files], zygote) == 0, capsys.readouterr().out

    measured = msgspec.json.decode(out.read_bytes(), type=CacheRun)
    tiers = {cell.system: cell for cell in measured.cells if isinstance(cell, TierCell)}
    assert list(tiers) == ["plain", "prefix", "host"]
    assert [answer.computed for cell in tiers.values() for answer in cell.cold] == [PROMPT_TOKENS] * 3
    assert [tiers[name].warm[0].from_engine for name in tiers] == [0, FOUND_TOKENS, 0]
    assert tiers["host"].warm[0].tiers["host"] >= FOUND_TOKENS
    assert {raw.name for raw in tiers["host"].raws} == {"memcpy"}
    workloads = {cell.system: cell for cell in measured.cells if isinstance(cell, WorkloadCell)}
    reused = {
        name: 1 - sum(a.computed for a in cell.answers) / sum(a.prompt_tokens for a in cell.answers)
        for name, cell in workloads.items()
    }
    assert reused["plain"] == 0.0
    assert reused["host"] >= workloads["host"].possible - 0.001, "the arena holds what the engine forgets"
    assert reused["prefix"] < reused["host"]
    (survivor,) = [cell for cell in measured.cells if isinstance(cell, SurviveCell)]
    assert min(answer.from_outside for answer in survivor.answers) >= FOUND_TOKENS

    assert "## What it means" in report.read_text()
    assert report.with_suffix(".svg").read_text().startswith("<svg")
    assert run([*SMALL, *few, *files], zygote) == 0, "a second time it only reads the state"
    assert group_members(zygote.pid), "the shared zygote is left running"
