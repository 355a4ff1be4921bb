"""Loads that run beside the forward pass which computes with them: exact, and thrown away whole if a block differs."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster.launcher import Cluster
from tests.engine.client import Answer, ask, ask_all, metric, record
from tests.engine.clusters import CHUNKED
from tests.engine.prompts import BLOCK, LENGTHS, token_prompt
from tests.engine.test_cache import BIG, check_equal, completion, figures, flip, settled, tokens_of
from tests.engine.test_tensor_parallel import ranks
from tests.poll import until

pytestmark = [pytest.mark.engine, pytest.mark.host_memory, pytest.mark.timeout(600)]

FIRST = completion(300, 500)
"""Of a started engine the first load maps the arena, and is never part of a step."""


def stored_then_restarted(cluster: Cluster, *asked: dict[str, Any]) -> None:
    """The arena has them, in this order; the engine has none, but has loaded once."""
    for body in (*asked, FIRST):
        ask(cluster.url, body)
    settled(cluster)
    for instance in cluster.instances:
        cluster.restart(instance.name)
    assert not in_step(cluster, ask(cluster.url, FIRST))


def in_step(cluster: Cluster, answer: Answer) -> bool:
    """Whether the decode instance's load ran beside its forward pass."""
    loads = record(cluster.url, answer)["decode"]["from_cache"]
    return bool(loads) and all(load["in_step"] for load in loads)


def check_close(answers: list[Answer], expected: Answer) -> None:
    """Also where a bad block would change no token."""
    for answer in answers:
        assert answer.logprobs == pytest.approx(expected.logprobs, abs=1e-3)
        assert answer.outcome() == expected.outcome()


@pytest.mark.parametrize("topology", ["0P1D", "1P1D"])
def test_every_length_is_exact_whole_or_with_more_behind_it(
    start: Callable[..., Cluster], plain: Cluster, topology: str
) -> None:
    cluster = start(topology, *CHUNKED, cache=BIG)
    asked = [completion(length, 510 + length) for length in LENGTHS if length > BLOCK]
    stored_then_restarted(cluster, *asked)
    for index, body in enumerate(asked):
        longer = body | {"prompt": body["prompt"] + token_prompt(600, 511)}
        for each in (longer, body) if index % 2 else (body, longer):
            answer = ask(cluster.url, each)
            assert answer.outcome() == ask(plain.url, each).outcome()
            tokens = tokens_of(cluster, answer)
            assert tokens["from_cache"] + tokens["found_locally"] >= len(body["prompt"]) // BLOCK * BLOCK - 1
            if tokens["from_cache"] and not tokens["handed_over"]:
                assert in_step(cluster, answer), record(cluster.url, answer)


@pytest.mark.parametrize("more", [0, 900], ids=["a hit", "a hit and more"])
def test_what_was_computed_with_a_bad_block_is_thrown_away_and_nobody_else_finds_it(
    start: Callable[..., Cluster], plain: Cluster, more: int
) -> None:
    """Four ask for the same at once; the first computes anew, a block per step, while there is room for the others."""
    slowly = ("--max-num-batched-tokens", "2048", "--long-prefill-token-threshold", "128")
    cluster = start("0P1D", *slowly, cache=BIG)
    kept = completion(1900, 520)
    stored_then_restarted(cluster, kept)
    flip(cluster, 1000, 200 << 10)
    body = kept | {"prompt": kept["prompt"] + token_prompt(more, 521), "logprobs": 1}
    expected = ask(plain.url, body)
    answers = ask_all(cluster.url, [body] * 4, 4)
    check_close(answers, expected)
    lost = [answer for answer in answers if record(cluster.url, answer)["outcome"] == "fell_back"]
    assert lost, "the first was on trial; another may have asked before the block was known to be bad"
    assert any(tokens_of(cluster, answer)["computed"] == 1900 + more for answer in lost)
    for answer in lost:
        entry, tokens = record(cluster.url, answer), tokens_of(cluster, answer)
        assert (tokens["prompt"], tokens["from_cache"]) == (1900 + more, 0), entry
        assert "differs" in entry["decode"]["why"]
    assert figures(cluster)["quarantined_blocks"] == 1
    check_close([ask(cluster.url, body)], expected)

    settled(cluster)
    cluster.restart("decode-0")  # nothing that the bad step computed was stored
    ask(cluster.url, FIRST)
    again = ask(cluster.url, body)
    check_close([again], expected)
    assert in_step(cluster, again)
    assert tokens_of(cluster, again)["from_cache"] >= (1900 + more) // BLOCK * BLOCK - 1, "all of it was stored anew"


def test_who_else_is_in_the_step_notices_nothing(start: Callable[..., Cluster], plain: Cluster) -> None:
    """Neither of a load beside its tokens nor of one that is thrown away."""
    cluster = start("0P1D", *CHUNKED, cache=BIG)
    bad, good = completion(600, 560), completion(700, 561)
    stored_then_restarted(cluster, bad, good)
    flip(cluster, 1000, 200 << 10)
    answering = completion(200, 562) | {"max_tokens": 600, "logprobs": 1, "stream": True}
    expected = [ask(plain.url, body) for body in (answering, bad, good)]
    num_begun = metric(cluster.url, "baton_time_to_first_token_seconds_count")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, cluster.url, answering)
        until(
            lambda: metric(cluster.url, "baton_time_to_first_token_seconds_count") > num_begun, what="the first token"
        )
        others = [ask(cluster.url, body) for body in (good, bad)]
        assert not running.done(), "it was in every step"
        check_close([running.result()], expected[0])
    check_equal(others, [expected[2], expected[1]])
    assert in_step(cluster, others[0])
    assert record(cluster.url, others[1])["outcome"] == "fell_back"


def test_a_random_draw_is_never_made_in_vain(start: Callable[..., Cluster], plain: Cluster) -> None:
    """A seeded request gets the same tokens with a bad block too, so it is never on trial."""
    cluster = start("0P1D", *CHUNKED, cache=BIG)
    kept = completion(600, 530) | {"temperature": 1.0, "seed": 7}
    stored_then_restarted(cluster, kept)
    flip(cluster, 1000)
    check_equal([ask(cluster.url, kept)], [ask(plain.url, kept)])
    assert figures(cluster)["quarantined_blocks"] == 1


def test_what_is_sent_to_a_peer_is_never_on_trial(start: Callable[..., Cluster], plain: Cluster) -> None:
    """The decode instance cannot see that a block with which its peer has computed was bad."""
    cluster = start("1P1D", *CHUNKED, cache=BIG)
    kept = completion(1000, 535)
    for body in (kept, FIRST):
        ask(cluster.url, body)
    settled(cluster)
    cluster.restart("prefill-0")  # the decode instance still has both
    before = ask(cluster.url, FIRST | {"prompt": FIRST["prompt"] + token_prompt(700, 536)})
    assert record(cluster.url, before)["prefill"]["from_cache"], "from now on it has mapped the arena"
    flip(cluster, 1000, 200 << 10)
    body = kept | {"prompt": kept["prompt"] + token_prompt(700, 537), "logprobs": 1}
    answer = ask(cluster.url, body)
    assert figures(cluster)["quarantined_blocks"] == 1
    check_close([answer], ask(plain.url, body))


def test_a_decode_instance_killed_between_two_layers_of_a_load(
    start: Callable[..., Cluster], plain: Cluster, tmp_path: Path
) -> None:
    reached = tmp_path / "reached"
    fault = {"phase": "load", "layer": 2, "record": str(reached), "action": "kill"}  # only such a load has layers
    cluster = start("1P1D", *CHUNKED, cache=BIG, restart=True, connector_decode={"fault": fault})
    body = completion(1000, 540)
    expected = ask(plain.url, body)
    stored_then_restarted(cluster, body)
    check_equal([ask(cluster.url, body)], [expected])
    assert json.loads(reached.read_text())["layer"] == 2
    until(lambda: figures(cluster)["reserved_bytes"] + figures(cluster)["cooling_bytes"] == 0, what="the reservations")
    check_equal([ask(cluster.url, body)], [expected])


def test_each_of_two_ranks_loads_its_part_and_one_bad_part_spoils_both(start: Any, plain: Cluster) -> None:
    cluster = start("0P1D", cache=BIG, arguments_decode=ranks(2))
    asked = [completion(1300, 550), completion(700, 551)]
    theirs = ask_all(plain.url, asked, 2)
    stored_then_restarted(cluster, *asked)
    whole = ask(cluster.url, asked[1])
    check_equal([whole], theirs[1:])
    assert in_step(cluster, whole)
    (from_host,) = record(cluster.url, whole)["decode"]["from_cache"]
    slot_bytes = from_host["bytes"] // -(-700 // BLOCK)
    flip(cluster, slot_bytes // 2 + 1000)  # what the second rank keeps of the first slot
    bad = ask(cluster.url, asked[0])
    check_equal([bad], theirs[:1])
    assert tokens_of(cluster, bad)["computed"] == 1300
    assert figures(cluster)["quarantined_blocks"] == 1
