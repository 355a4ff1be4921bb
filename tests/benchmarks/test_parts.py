"""The parts of a measurement without an engine: shapes, yardstick, stream, order, bar, cores."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest

from benchmarks import cores
from benchmarks.bar import Bar
from benchmarks.client import Streamed, token_counts
from benchmarks.measure import turned
from benchmarks.memcpy import CacheShape, Yardstick
from benchmarks.shapes import SHAPES, write_model
from benchmarks.systems import SYSTEMS, Recipe
from cluster.bundled import BUNDLED_FOLDER
from core.clock import ManualClock, SystemClock
from core.errors import BatonError
from engine.instance import ENV_VLLM_CORES


@pytest.mark.parametrize(("name", "token_bytes"), [("qwen2.5-0.5b", 12_288), ("qwen2.5-1.5b", 28_672)])
def test_shapes_have_the_kv_of_the_models_that_they_are_named_after(name: str, token_bytes: int) -> None:
    assert SHAPES[name].token_bytes() == token_bytes
    assert Recipe(SHAPES[name], "float32").token_bytes == 2 * token_bytes


def test_a_written_model_has_the_shape_and_the_bundled_tokenizer(tmp_path: Path) -> None:
    shape = SHAPES["qwen2.5-1.5b"]
    config = json.loads((write_model(shape, tmp_path / "model", BUNDLED_FOLDER) / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_key_value_heads"], config["head_dim"]) == (28, 2, 128)
    assert (tmp_path / "model" / "tokenizer.json").exists()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_yardstick_copies_whole_chunks_and_what_remains() -> None:
    yardstick = Yardstick(CacheShape(num_layers=2, block_bytes=4096, num_blocks=8), SystemClock())
    times = yardstick.measure(num_blocks=5, blocks_per_chunk=2)
    yardstick.close()
    assert times.num_bytes == 2 * 5 * 4096
    assert min(times.cold_s, times.warm_s, times.run_s) > 0


def test_a_cache_smaller_than_the_prompt_is_copied_once() -> None:
    yardstick = Yardstick(CacheShape(num_layers=1, block_bytes=4096, num_blocks=4), SystemClock())
    assert yardstick.measure(num_blocks=9, blocks_per_chunk=4).num_bytes == 4 * 4096
    yardstick.close()


def test_a_stream_is_counted_by_what_the_server_counts() -> None:
    lines = [
        b'data: {"choices": [{"text": ""}], "usage": {"completion_tokens": 1}}\n',
        b"\n",
        b'data: {"choices": [{"text": "ab"}], "usage": {"completion_tokens": 3}}\n',
        b'data: {"choices": [], "usage": {"completion_tokens": 3}}\n',
        b"data: [DONE]\n",
    ]
    assert list(token_counts(iter(lines))) == [1, 2]


def test_a_stream_that_breaks_off_or_carries_an_error_is_an_error() -> None:
    with pytest.raises(BatonError, match="without"):
        list(token_counts(iter([b'data: {"choices": []}\n'])))
    with pytest.raises(BatonError, match="too bad"):
        list(token_counts(iter([b'data: {"error": "too bad"}\n'])))


def test_gaps_are_what_lies_between_arrivals() -> None:
    assert Streamed("id", (1.0, 1.5, 2.5), 3).gaps_s == [0.5, 1.0]


def test_every_system_begins_equally_often() -> None:
    systems = list(SYSTEMS.values())
    firsts = [turned(systems, repeat)[0].name for repeat in range(6)]
    assert {firsts.count(name) for name in SYSTEMS} == {2}
    assert sorted(system.name for system in turned(systems, 1)) == sorted(SYSTEMS)


def test_the_bar_shows_share_and_time_left() -> None:
    clock = ManualClock()
    bar = Bar(io.StringIO(), clock, total=100.0)
    assert "measuring" in bar.line("x")
    bar.advance(25.0)
    clock.advance(10.0)
    assert bar.line("512 tokens").split(" ", 3)[2].startswith("[######......")
    assert "25%  30 s left  512 tokens" in bar.line("512 tokens")


def test_a_bar_that_nobody_watches_prints_a_line_every_ten_seconds() -> None:
    clock, stream = ManualClock(), io.StringIO()
    bar = Bar(stream, clock, total=10.0)
    for _ in range(25):
        bar.show("x")
        clock.advance(1.0)
    bar.close()
    assert len(stream.getvalue().splitlines()) == 3
    assert "\r" not in stream.getvalue()


def test_planning_happens_on_the_given_cores_alone_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_VLLM_CORES, "0-63")
    before = os.sched_getaffinity(0)
    prefill, _ = cores.pair()
    with cores.only({prefill}):
        assert os.sched_getaffinity(0) == {prefill}
        assert ENV_VLLM_CORES not in os.environ
    assert os.sched_getaffinity(0) == before
    assert os.environ[ENV_VLLM_CORES] == "0-63"
