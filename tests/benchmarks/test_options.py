"""`baton bench handoff` refuses before anything is started, and names what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.handoff import run
from benchmarks.options import HandoffOptions, parse
from benchmarks.shapes import SHAPES
from benchmarks.systems import MAX_PROMPT_TOKENS
from core.errors import ConfigError


def parsed(*arguments: str, has_fast_bfloat16: bool = True) -> HandoffOptions:
    return parse(arguments, has_fast_bfloat16)


def test_the_defaults_are_those_of_the_results_file() -> None:
    options = parsed()
    assert options.recipe.shape.name == "qwen2.5-1.5b"
    assert options.prompts == (512, 2048, 4000)
    assert options.repeats == 5
    assert [system.name for system in options.systems] == ["plain", "shm", "zmq"]
    assert options.recipe.max_num_batched_tokens == 2048


def test_quick_is_shorter_and_what_is_given_wins_over_it() -> None:
    quick = parsed("--quick")
    assert max(quick.prompts) <= 512
    assert quick.repeats < parsed().repeats
    given = parsed("--quick", "--prompts", "1000", "--repeats", "7")
    assert (given.prompts, given.repeats) == ((1000,), 7)


def test_the_dtype_follows_the_processor_unless_it_is_given() -> None:
    assert parsed().recipe.dtype == "bfloat16"
    assert parsed(has_fast_bfloat16=False).recipe.dtype == "float32"
    assert parsed("--dtype", "bfloat16", has_fast_bfloat16=False).recipe.dtype == "bfloat16"


def test_the_longest_prompt_fits_twice_into_every_cache() -> None:
    """Hand-offs may reserve half of a decode instance's blocks."""
    for shape in SHAPES:
        recipe = parsed("--dtype", "float32", "--shape", shape).recipe
        assert recipe.kv_cache_bytes // recipe.token_bytes >= 2 * MAX_PROMPT_TOKENS


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "llama"], "unknown shape 'llama'; known: qwen2.5-0.5b, qwen2.5-1.5b"),
        (["--systems", "plain,tcp"], "unknown system 'tcp'; known: plain, shm, zmq"),
        (["--systems", "shm,shm"], "names something twice"),
        (["--prompts", "512,,1"], "--prompts: '' is not a number"),
        (["--prompts", "128"], "--prompts: 128 is not between 129 and"),
        (["--prompts", "5000"], "--prompts: 5000 is not between"),
        (["--prompts", "512,512"], "names something twice"),
        (["--repeats", "0"], "--repeats: 0 is not between 1 and"),
        (["--repeats", "many"], "--repeats: 'many' is not a number"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--max-num-batched-tokens", "7"], "--max-num-batched-tokens: 7 is not between"),
        (["--out", "/no/such/folder/x.json"], "--out /no/such/folder/x.json: no such folder"),
        (["--markdown", "/no/such/folder/x.md"], "--markdown"),
        (["--repeat", "3"], "did you mean --repeats?"),
        (["--prompts"], "expected one argument"),
    ],
)
def test_a_wrong_option_is_a_config_error_that_names_it(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run(arguments)
    assert said in str(caught.value)


def test_a_file_in_the_current_folder_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parsed("--out", "x.json").out == Path("x.json")
