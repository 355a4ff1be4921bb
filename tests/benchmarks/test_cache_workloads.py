"""The four workloads: the same text and seed give the same prompts, and they hold what they claim to be reused."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.corpus import Corpus, read_corpus
from benchmarks.workloads import (
    BLOCK_TOKENS,
    MAX_PROMPT_TOKENS,
    WORKLOADS,
    Situation,
    longest,
    possible_reuse,
    prompts_of,
    requests_per_family,
    situations,
    working_set_blocks,
)
from core.errors import ConfigError

NEAR = 0.12
"""One request more or less of a family makes so much of a difference at low reuse."""


def noise(num_tokens: int, seed: int) -> Corpus:
    dice = random.Random(seed)
    prose, code = ([dice.randrange(2048) for _ in range(num_tokens)] for _ in range(2))
    return Corpus(prose, code, "noise")


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return noise(60_000, 0)


def situation(workload: str, reuse: int, num_active: int = 3) -> Situation:
    return Situation(workload, reuse, "large" if reuse else "none", num_active, 40)


def longest_shared(prompts: list[tuple[int, ...]]) -> int:
    """Prompt tokens, in whole blocks, that an earlier prompt begins with: counted the slow way."""
    found = 0
    for index, prompt in enumerate(prompts):
        best = 0
        for earlier in prompts[:index]:
            same = next((at for at, (a, b) in enumerate(zip(prompt, earlier, strict=False)) if a != b), None)
            best = max(best, min(len(prompt), len(earlier)) if same is None else same)
        found += min(best, len(prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    return found


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("reuse", [0, 50, 75, 90])
def test_a_workload_has_the_reuse_that_was_asked_for(corpus: Corpus, workload: str, reuse: int) -> None:
    prompts = prompts_of(situation(workload, reuse), corpus, "0")
    share = longest_shared(prompts) / sum(map(len, prompts))
    assert share == pytest.approx(reuse / 100, abs=NEAR)
    assert possible_reuse(prompts) == pytest.approx(share)
    assert len(prompts) >= 40
    assert max(map(len, prompts)) == longest(workload) <= MAX_PROMPT_TOKENS


def test_without_reuse_no_prompt_shares_a_block_with_another(corpus: Corpus) -> None:
    for workload in WORKLOADS:
        prompts = prompts_of(situation(workload, 0), corpus, "0")
        assert possible_reuse(prompts) == 0.0
        assert working_set_blocks(prompts) == sum(len(prompt) // BLOCK_TOKENS for prompt in prompts)


@given(st.sampled_from(WORKLOADS), st.sampled_from([0, 50, 90]), st.text(max_size=4))
def test_the_same_seed_gives_the_same_prompts_and_another_one_others(workload: str, reuse: int, seed: str) -> None:
    corpus = noise(9_000, 1)
    asked = Situation(workload, reuse, "large", 2, 8)
    assert prompts_of(asked, corpus, seed) == prompts_of(asked, corpus, seed)
    assert prompts_of(asked, corpus, seed) != prompts_of(asked, corpus, seed + "x")


def test_a_conversation_grows_by_turns_that_other_conversations_come_between(corpus: Corpus) -> None:
    turns = requests_per_family("multi-turn", 90)
    prompts = prompts_of(Situation("multi-turn", 90, "large", 4, turns * 4), corpus, "0")
    by_first: dict[int, list[tuple[int, ...]]] = {}
    for prompt in prompts:
        by_first.setdefault(hash(prompt[:256]), []).append(prompt)
    assert [len(conversation) for conversation in by_first.values()] == [turns] * 4
    for conversation in by_first.values():
        for earlier, later in itertools.pairwise(conversation):
            assert later[: len(earlier)] == earlier
            assert len(later) > len(earlier)
    assert len({hash(prompt[:256]) for prompt in prompts[:4]}) == 4


def test_large_working_sets_are_larger_than_the_engines_cache_and_small_ones_fit() -> None:
    engine_tokens = 2176
    for each in situations(WORKLOADS, (0, 50, 90), engine_tokens, 100):
        active_tokens = each.num_active * longest(each.workload)
        if each.size == "small":
            assert active_tokens < engine_tokens
        elif each.size == "large":
            assert active_tokens >= 2.5 * engine_tokens
    sizes = [
        (each.reuse, each.size, each.num_requests) for each in situations(["rag"], (0, 50, 90), engine_tokens, 100)
    ]
    assert sizes == [(0, "none", 40), (50, "small", 40), (50, "large", 40), (90, "small", 40), (90, "large", 100)]


def test_the_text_that_comes_with_baton_is_enough_and_says_where_it_is_from() -> None:
    corpus = read_corpus(None)
    assert "plays.txt" in corpus.source
    assert "standard library of Python" in corpus.source
    dice = random.Random(0)
    assert len(corpus.prose(30_000, dice)) == 30_000
    assert len(corpus.code(1_000, dice)) == 1_000


def test_a_folder_without_text_or_with_too_little_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no \*\.txt in it"):
        read_corpus(tmp_path)
    (tmp_path / "a.txt").write_text("To be, or not to be")
    with pytest.raises(ConfigError, match="tokens of prose are too few"):
        read_corpus(tmp_path)
