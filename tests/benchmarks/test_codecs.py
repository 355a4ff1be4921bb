"""`baton bench codecs`: blocks as the engine lays them, and figures that say what they are named after."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.codec_report import CodecRun, QualityRow, SpeedRow, file_name, markdown, text_tables
from benchmarks.codecs import parse, run
from benchmarks.kv_blocks import BLOCK_SIZE, BlockKind, blocks_of, keys_and_values
from benchmarks.machine import Machine
from benchmarks.quality import GREEDY_TOKENS, Quality, Reading, quality
from core.errors import ConfigError
from kvcache.elements import read_floats

KIND = BlockKind("float32", 2, 3, 16)
MACHINE = Machine("AMD EPYC (family 23 model 1)", 2, 8 << 20, 24 << 30, "6.1", "3.11", "2", "0.32", "0.1", 0.0)


def test_blocks_hold_each_heads_keys_by_channel_and_then_its_values_by_token() -> None:
    tokens = 2 * BLOCK_SIZE
    keys = np.arange(2 * 3 * tokens * 16, dtype=np.float32).reshape(2, 3, tokens, 16)
    first, second = blocks_of(keys, -keys, KIND)
    assert (len(first), KIND.shape.fits(len(first))) == (KIND.num_bytes, True)
    numbers = read_floats(memoryview(second), "float32").reshape(2, 3, 2, KIND.shape.head_elements)
    assert numbers[1, 2, 0, :2].tolist() == [keys[1, 2, 128, 0], keys[1, 2, 129, 0]]
    assert numbers[1, 2, 1, :2].tolist() == [-keys[1, 2, 128, 0], -keys[1, 2, 128, 1]]
    back = keys_and_values([first, second], KIND)
    assert np.array_equal(back[0], keys)
    assert np.array_equal(back[1], -keys)


def test_quality_counts_bits_choices_and_answers_up_to_the_first_difference() -> None:
    greedy = np.zeros((2, GREEDY_TOKENS), np.int64)
    exact = Reading(np.full((2, 4), 3.0), np.zeros((2, 4), np.int64), greedy)
    assert quality(exact, exact, 12) == Quality(2.0, 1.0, 1.0, 1.0)
    other_greedy = greedy.copy()
    other_greedy[1, GREEDY_TOKENS // 4] = 1  # equal again afterwards, which counts for nothing
    other = Reading(np.full((2, 4), 4.0), np.array([[0, 0, 0, 1], [0] * 4]), other_greedy)
    found = quality(exact, other, 16)
    assert (found.bits_per_byte, found.same_choices) == (2.0, 7 / 8)
    assert (found.same_greedy, found.same_answers) == ((1 + 1 / 4) / 2, 0.5)


def test_the_tables_say_the_change_against_exact_kv_of_the_same_dtype(tmp_path: Path) -> None:
    greedy = np.zeros((1, GREEDY_TOKENS), np.int64)
    reading = Reading(np.full((1, 4), 4.0), np.zeros((1, 4), np.int64), greedy)
    rows = [
        QualityRow(name, dtype, quality(reading, reading, num_bytes))
        for name, dtype, num_bytes in (("exact", "bfloat16", 8), ("exact", "float32", 16), ("int8", "float32", 10))
    ]
    result = CodecRun("baton bench codecs", "2026-11-25 10:00 UTC", MACHINE, 1, (_speed_row(),), tuple(rows))
    assert "+0.60000" in text_tables(result)
    assert "| zstd | bfloat16 | 0.712 | 0.25 | 0.50 |" in markdown(result)
    assert file_name(result, tmp_path).name == "codecs_amd-epyc-2-cores_2026-11-25.md"


def _speed_row() -> SpeedRow:
    return SpeedRow("zstd", "bfloat16", 0.712, 0.25, 0.5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--text"),
        (["--text", "/nowhere"], "--text /nowhere: no such file"),
        (["--text", __file__, "--markdown", "/nowhere/x.md"], "--markdown /nowhere/x.md: no such folder"),
        (["--text", __file__, "--fast"], "--fast"),
    ],
)
def test_wrong_options_are_refused_before_a_model_is_loaded(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run(arguments)


def test_quick_takes_fewer_windows() -> None:
    assert parse(["--text", __file__, "--quick"]).windows < parse(["--text", __file__]).windows
