"""`baton bench transfer` with real processes: that it measures what it says, not how fast."""

from __future__ import annotations

import io
import os
import signal
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from benchmarks.bar import Bar
from benchmarks.kv_models import KV_MODELS
from benchmarks.kv_pool import PoolShape, Walk
from benchmarks.mover import Job
from benchmarks.transfer import run
from benchmarks.transfer_end import Place
from benchmarks.transfer_inside import run_inside
from benchmarks.transfer_measure import Measurement, memories
from benchmarks.transfer_options import parse
from benchmarks.transfer_pair import Pair, Process, awake, move
from benchmarks.transfer_results import Run, Table
from benchmarks.transfer_systems import System, systems
from cluster.zygote import Zygote
from core.clock import ManualClock
from core.errors import ConfigError, TransferError

SHAPE = PoolShape(3, 4096, 16)
SMALL = ["--memory", "16MiB", "--repeats", "2"]


@pytest.fixture
def fds() -> Iterator[tuple[int, int]]:
    with memories(SHAPE, 0) as both:
        yield both


def test_a_small_run_measures_every_system_by_turns_and_writes_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--models", "qwen2.5-0.5b", "--blocks", "piece,3,5000", "--pairs", "1,2", *SMALL]
    asked += ["--systems", "shm,zmq,tcp-raw,pyzmq-raw"]
    out, report = tmp_path / "x.json", tmp_path / "y.md"
    assert run([*asked, "--out", str(out), "--markdown", str(report)]) == 0

    measured = msgspec.json.decode(out.read_bytes(), type=Run)
    assert measured.absences == ()
    names = ["memcpy", "shm", "zmq", "tcp-raw", "pyzmq-raw"]
    kinds = {(sample.cell.num_blocks, sample.cell.grain, sample.cell.num_pairs) for sample in measured.samples}
    assert kinds == {(0, "end", 1), (3, "end", 1), (3, "layer", 1), (0, "end", 2), (3, "end", 2), (3, "layer", 2)}
    for kind in kinds:
        at = [
            sample
            for sample in measured.samples
            if (sample.cell.num_blocks, sample.cell.grain, sample.cell.num_pairs) == kind
        ]
        assert sorted(sample.system for sample in at) == sorted(2 * names)
        assert all(len(sample.latencies_s) == kind[2] and min(sample.latencies_s) > 0 for sample in at)
        assert all(sample.cpu_s > 0 for sample in at)
    assert {sample.cell.num_bytes for sample in measured.samples} == {8192, 3 * 24 * 8192}

    said = capsys.readouterr().out
    assert "5,000 blocks do not fit" in said
    assert "shm 0.9 of a memcpy's speed or more, over 8 MB: not measured" in said
    text = report.read_text()
    assert "| 3 blocks, 589.8 kB | memcpy |" in text
    assert "(y.svg)" in text
    table = msgspec.json.decode((tmp_path / "y.json").read_bytes(), type=Table)
    assert len(table.rows) == len(kinds) * len(names)
    lines = ElementTree.parse(tmp_path / "y.svg").getroot().findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(lines) == 2 * 2 * len(names)


def test_who_cannot_run_here_is_kept_with_the_reason_and_refused_by_name() -> None:
    known = {system.name: system for system in systems(None)}
    assert "scripts/mooncake_env" in known["mooncake"].why_not
    assert known["cuda_ipc"].why_not, "no scheme of the registry is passed over in silence"
    assert {"shm", "zmq"} <= {name for name, system in known.items() if system.is_baton and not system.why_not}
    with pytest.raises(ConfigError, match=r"--systems: mooncake cannot run here: .*scripts/mooncake_env"):
        parse(["--systems", "mooncake"])


def test_bytes_that_went_elsewhere_are_found(fds: tuple[int, int]) -> None:
    with memories(SHAPE, 1) as others, closing(Pair(System("memcpy"), SHAPE, *fds)) as pair:
        pair.receiver.close()
        pair.receiver = Process(System("memcpy"), Place(os.getpid(), False, "memcpy", SHAPE, *others))
        pair.connect()
        with awake([pair]), pytest.raises(TransferError, match="not what was sent"):
            pair.check(Job("a", (1, 2), (3, 4), 3))


def test_a_stopped_process_moves_nothing_and_a_killed_one_is_named(fds: tuple[int, int]) -> None:
    with closing(Pair(System("tcp-raw"), SHAPE, *fds)) as pair:
        pair.connect()
        with awake([pair]):
            pair.check(Job("a", (1, 2), (3, 4), 3))
            pair.sender.signal(signal.SIGKILL)
            with pytest.raises(TransferError, match="tcp-raw's sender has ended"):
                move([pair], [Job("b", (1,), (3,), 3)], 0.0)
        pair.close()


def test_no_turn_begins_when_the_time_is_up() -> None:
    clock = ManualClock()
    options = parse(["--quick", "--memory", "1MiB", "--blocks", "piece,1", "--systems", "tcp-raw"])
    assert 0 < options.sweep.seconds < 60
    measurement = Measurement(Bar(io.StringIO(), clock, 1.0), clock, options.sweep.seconds)
    clock.advance(options.sweep.seconds + 1)
    measurement.measure(options.models[0], options.sweep, 1, options.systems)
    assert measurement.is_cut_short
    assert measurement.samples == []


@pytest.mark.full
@pytest.mark.timeout(60)
def test_quick_takes_less_than_a_minute_also_on_a_busy_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """Who is not ready in time is left out, and named."""
    code, said = run(["--quick"]), capsys.readouterr().out
    assert "  shm " in said
    assert "  tcp-raw " in said or code == 1


@pytest.mark.engine
@pytest.mark.timeout(300)
def test_inside_a_running_1p1d(zygote: Zygote | None, capsys: pytest.CaptureFixture[str]) -> None:
    if zygote is None:
        pytest.skip("measures CPU instances")
    options = parse(["--inside", "--quick", "--systems", "shm", "--repeats", "1"])
    assert run_inside(options, "baton bench transfer --inside", zygote) == 0
    said = capsys.readouterr().out
    assert "last layer to Landed" in said
    assert "NOT VALID" not in said


def test_a_walk_returns_to_a_block_only_after_all_others() -> None:
    walk = Walk(10, 1)
    taken = [block for _ in range(10) for block in walk.take(3)]
    assert taken[:10] == taken[10:20] == taken[20:]
    assert sorted(taken[:10]) == list(range(10))
    assert taken[:10] != list(range(10))


def test_models_cost_what_their_configurations_say() -> None:
    assert {
        name: KV_MODELS[name].token_bytes for name in ("qwen2.5-0.5b", "llama-3-8b", "llama-3-70b", "deepseek-v3")
    } == {
        "qwen2.5-0.5b": 12_288,
        "llama-3-8b": 131_072,
        "llama-3-70b": 327_680,
        "deepseek-v3": 70_272,
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--models", "gpt-5"], "--models: unknown model 'gpt-5'"),
        (["--blocks", "some"], "--blocks: 'some' is not a number"),
        (["--memory", "much"], "--memory much: a size like 512MiB"),
        (["--systems", "smh"], "--systems: unknown system 'smh'"),
        (["--grains", "token"], "--grains: unknown grain 'token'"),
        (["--mooncake", "/nowhere"], "scripts/mooncake_env /nowhere"),
        (["--picture", "/nowhere/x.svg"], "--picture /nowhere/x.svg: no such folder"),
        (["--qick"], "did you mean --quick"),
    ],
)
def test_wrong_options_are_refused_by_name(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(arguments)
