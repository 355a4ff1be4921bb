"""A benchmark that was interrupted goes on where it was, and never mixes two runs."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from benchmarks.cache_results import CacheRun, State
from core.errors import ConfigError
from tests.benchmarks.cache_runs import HEADER, good_run, lookup_cell, tier_cell


def test_finished_cells_are_found_again_by_the_same_run(tmp_path: Path) -> None:
    path = tmp_path / "state"
    first = State(path, HEADER)
    first.add(tier_cell("host", "host", 60.0))
    first.add(lookup_cell())
    second = State(path, HEADER)
    assert second.cells == first.cells
    assert second.has("tiers/host/4000")
    assert second.has("lookup")
    assert not second.has("tiers/disk/4000")


def test_a_cell_that_was_cut_off_by_a_kill_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "state"
    state = State(path, HEADER)
    state.add(tier_cell("host", "host", 60.0))
    state.add(lookup_cell())
    path.write_bytes(path.read_bytes()[:-20])
    again = State(path, HEADER)
    assert list(again.cells) == ["tiers/host/4000"]
    again.add(lookup_cell())
    assert list(State(path, HEADER).cells) == ["tiers/host/4000", "lookup"]


def test_a_run_with_other_options_does_not_take_the_cells(tmp_path: Path) -> None:
    path = tmp_path / "state"
    State(path, HEADER).add(lookup_cell())
    with pytest.raises(ConfigError, match="belongs to a run with repeats 3: name another file"):
        State(path, msgspec.structs.replace(HEADER, repeats=5))


def test_what_is_no_state_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="is not a state file"):
        State(path, HEADER)
    assert path.read_text() == "mine"


def test_without_a_file_cells_are_only_remembered() -> None:
    state = State(None, HEADER)
    state.add(lookup_cell())
    assert state.has("lookup")


def test_a_whole_run_survives_its_json() -> None:
    assert msgspec.json.decode(msgspec.json.encode(good_run()), type=CacheRun) == good_run()
