"""A prompt's end in the middle of a block: kept, found again by whoever continues or repeats it, and by nobody else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.keys import namespace
from kvcache.partial import MIN_TOKENS, PartialBlocks, root_key
from tests.kvcache.instance import BLOCK_SIZE, Instance
from tests.kvcache.places import BLOCK_BYTES, SPACE, Server, key, serving
from tests.poll import until

TAIL = tuple(range(100, 120))
OTHERS = tuple(range(500, 520))
PROMPT = (1, 2)
FULL = len(PROMPT) * BLOCK_SIZE


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path, 32 * BLOCK_BYTES) as running:
        yield running


@pytest.fixture
def instance(server: Server) -> Iterator[Instance]:
    made = Instance(server.socket, budget_s=5.0)
    yield made
    made.close()


def store(instance: Instance, numbers: Sequence[int], tail: Sequence[int], name: str = "first") -> list[bytes]:
    """One request computes its whole prompt; returns its blocks, the partial one last."""
    instance.arrive(name, numbers, tail)
    blocks = [instance.engine.fill(index, 10 * index + tail[0]) for index in range(len(numbers) + 1)]
    assert instance.compute(name, numbers, len(numbers), len(tail)) == len(numbers) + 1
    instance.finish(name)
    return blocks


@pytest.mark.parametrize(
    ("tail", "num_tokens"),
    [(TAIL, len(TAIL) - 1), ((*TAIL, 7), len(TAIL)), (TAIL[:18], 0), (OTHERS, 0)],
    ids=["the same prompt but its last token", "one token more", "shorter", "other tokens"],
)
def test_who_finds_it(instance: Instance, tail: Sequence[int], num_tokens: int) -> None:
    blocks = store(instance, PROMPT, TAIL)
    assert instance.arrive("second", PROMPT, tail) == FULL + num_tokens
    if num_tokens:
        loaded = instance.load("second", FULL + num_tokens, [9, 4, 7])
        assert (loaded.why, loaded.tokens) == ("", {"host": FULL + num_tokens})
        assert [instance.engine.block(block_id) for block_id in (9, 4, 7)] == blocks


def test_a_longer_prompt_that_goes_on_in_the_same_block(instance: Instance) -> None:
    """The block's first tokens are found although the whole block was never computed."""
    store(instance, (1,), (2,) * 20)
    assert instance.arrive("second", (1, 2, 3)) == BLOCK_SIZE + 20


def test_a_prompt_shorter_than_a_block(instance: Instance) -> None:
    (block,) = store(instance, (), TAIL)
    assert instance.arrive("second", (), (*TAIL, 1)) == len(TAIL)
    assert instance.load("second", len(TAIL), [5]).why == ""
    assert instance.engine.block(5) == block


def test_several_ends_of_one_beginning(instance: Instance, server: Server) -> None:
    store(instance, PROMPT, [200] * 20)
    for number in (201, 202):
        assert instance.arrive(f"r{number}", PROMPT, [number] * 20) == FULL
        instance.engine.fill(2, number)
        assert instance.compute(f"r{number}", PROMPT, 2, 20) == 1
        instance.finish(f"r{number}")
    for number in (200, 201, 202):
        assert instance.arrive(f"again{number}", PROMPT, [number] * 20) == FULL + 19
    assert server.figures()["blocks"] == 5


def test_too_short_an_end_is_not_kept(instance: Instance, server: Server) -> None:
    instance.arrive("first", PROMPT, TAIL[: MIN_TOKENS - 1])
    assert instance.compute("first", PROMPT, 2, MIN_TOKENS - 1) == 2
    assert server.figures()["reserved_bytes"] == 0


def test_an_end_that_was_never_computed_gives_its_place_back(instance: Instance, server: Server) -> None:
    instance.arrive("first", PROMPT, TAIL)
    assert instance.compute("first", PROMPT, 2) == 2
    instance.finish("first")
    until(lambda: server.figures()["reserved_bytes"] == 0, what="the place")


def test_after_everything_was_killed_the_disk_gives_the_whole_prompt_back(tmp_path: Path) -> None:
    word = f"disk={tmp_path}/disk:{100 * BLOCK_BYTES}"
    with serving(tmp_path, 32 * BLOCK_BYTES, word) as server:
        instance = Instance(server.socket, budget_s=5.0)
        blocks = store(instance, PROMPT, TAIL)
        until(lambda: server.figures()["disk_blocks"] == 3, what="the blocks on the disk")
        instance.close()
    with serving(tmp_path, 32 * BLOCK_BYTES, word) as server:
        instance = Instance(server.socket, budget_s=5.0)
        assert instance.arrive("second", PROMPT, TAIL) == FULL + len(TAIL) - 1
        loaded = instance.load("second", FULL + len(TAIL) - 1, [9, 4, 7])
        assert (loaded.why, loaded.tiers) == ("", {"disk": 3})
        assert [instance.engine.block(block_id) for block_id in (9, 4, 7)] == blocks
        instance.close()


def test_it_is_evicted_like_any_other_and_its_place_is_another_s_then(instance: Instance, server: Server) -> None:
    store(instance, PROMPT, TAIL)
    for number in range(40):
        instance.arrive(f"r{number}", (1000 + number,))
        instance.compute(f"r{number}", (1000 + number,), 1)
        instance.finish(f"r{number}")
    assert instance.arrive("second", PROMPT, TAIL) == 0


def test_computing_a_few_tokens_beats_loading_a_block(instance: Instance) -> None:
    store(instance, PROMPT, TAIL)
    instance.reader.pace.computed(1000, 1.0)
    instance.reader.pace.loaded(1000, 0.9, 0.9)
    assert instance.arrive("second", PROMPT, TAIL) == FULL, "19 tokens in 19 ms, a block of 32 in 29 ms"


tokens = st.lists(st.integers(0, 2**31), max_size=3 * BLOCK_SIZE)


@given(tokens, tokens)
def test_two_prompts_meet_exactly_in_what_they_share(left: list[int], right: list[int]) -> None:
    root = root_key(SPACE, "")
    partials = [PartialBlocks(root, [key(1), key(2), key(3)], ids, BLOCK_SIZE) for ids in (left, right)]
    last = partials[0].last
    num_full, num_tokens = divmod(len(left), BLOCK_SIZE)
    assert bool(last) == (num_tokens >= MIN_TOKENS)
    candidates = partials[1].after(num_full)
    begin = num_full * BLOCK_SIZE
    if last:
        assert (last in candidates) == (right[begin : len(left)] == left[begin:])
    if last in candidates:
        assert partials[1].num_tokens(num_full, candidates.index(last)) == num_tokens
    assert all(len(candidate) == 16 for candidate in candidates)


def test_other_tenants_and_other_models_have_other_roots() -> None:
    other = namespace("another fingerprint", "sha256")
    roots = {root_key(SPACE, ""), root_key(SPACE, "alice"), root_key(SPACE, "bob"), root_key(other, "")}
    assert len(roots) == 4
