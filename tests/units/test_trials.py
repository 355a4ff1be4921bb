"""Who computes with blocks that are compared later: nothing of it counts unless somebody has said they are equal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from engine.trials import Trials

ROOT = Path(__file__).parents[2]


def test_the_engine_forgets_the_blocks_of_whoever_was_lost_and_of_nobody_else() -> None:
    trials, evicted = Trials(), list[set[int]]()
    assert not trials.are_possible(), "it could not be undone"
    trials.watch(evicted.append)
    assert trials.are_possible()
    trials.begin("good", [1, 2])
    trials.begin("bad", [3, 4])
    assert trials.are_open()
    assert trials.block_ids() == [1, 2, 3, 4]
    assert trials.block_ids({"good"}) == [3, 4], "nobody loads them"
    trials.end("good", is_lost=False)
    trials.end("nobody", is_lost=True)
    assert evicted == []
    assert list(trials.unanswered()) == ["bad"]
    trials.end("bad", is_lost=True)
    assert evicted == [{3, 4}]
    assert not trials.are_open()


def test_a_mistake_of_ours_beside_a_trial_is_no_token() -> None:
    """Where nobody loads a block because a hook has failed, vLLM is told that it is bad."""
    command = [sys.executable, "-m", "tests.engine.broken_hooks"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told == {"no orders": [3, 4], "the step after it": [], "not begun": [7, 9]}
