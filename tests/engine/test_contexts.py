"""Contexts under real engines: computed ahead, found by whoever serves, dropped for good, every token what it was."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from client import BatonClient, Context, ContextNotFound, Generation
from cluster.launcher import Cluster
from kvcache.client import ask_figures, labels
from kvcache.partial import MIN_TOKENS
from kvcache.spec import CacheSpec
from tests.engine.client import ask
from tests.engine.clusters import CHUNKED
from tests.engine.prompts import BLOCK, ROOT, chat_messages, text_prompt
from tests.poll import until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

SAMPLING: dict[str, Any] = {
    "max_tokens": 12,
    "temperature": 0,
    "ignore_eos": True,
    "return_token_ids": True,
    "model": "baton-demo",
}


@pytest.fixture(scope="module")
def cluster(shared_cluster: Callable[..., Cluster]) -> Cluster:
    return shared_cluster("1P1D", *CHUNKED, cache=CacheSpec.parse("256MiB"))


@pytest.fixture
def client(cluster: Cluster) -> Iterator[BatonClient]:
    with BatonClient(cluster.url, timeout_s=100.0) as made:
        yield made


def restarted(cluster: Cluster) -> None:
    """Nobody has anything in its own cache."""
    for instance in cluster.instances:
        cluster.restart(instance.name)


def check_equal_to_plain(plain: Cluster, ours: Generation, **body: Any) -> None:
    theirs = ask(plain.url, {"max_tokens": 12, "ignore_eos": True} | body)
    assert list(ours.token_ids) == theirs.tokens[0]
    assert ours.text == theirs.text[0]


def from_cache(client: BatonClient, answer: Generation) -> int:
    """Tokens of the prompt that the cache gave; the record must add up."""
    tokens = client.record(answer.request_id).tokens
    parts = (tokens.handed_over, tokens.found_locally, tokens.from_cache, tokens.computed)
    assert tokens.prompt == sum(part or 0 for part in parts), tokens
    return tokens.from_cache or 0


def check_reused(cluster: Cluster, client: BatonClient, answer: Generation, part: Context) -> None:
    """Of a prompt that was handed over, decode loads the part's whole blocks and prefill its last, short one too."""
    assert from_cache(client, answer) == part.tokens // BLOCK * BLOCK

    def loaded_by_prefill() -> int:
        account = httpx.get(f"{cluster.url}/requests/{answer.request_id}").json()["prefill"]
        return sum(found["tokens"] for found in account["from_cache"]) if account else 0

    until(lambda: loaded_by_prefill() == kept_tokens(part.tokens))


def kept_tokens(tokens: int) -> int:
    """Of a prompt's tokens: a short end in the middle of a block is not."""
    return tokens if tokens % BLOCK >= MIN_TOKENS else tokens // BLOCK * BLOCK


def kept_blocks(tokens: int) -> int:
    return -(-kept_tokens(tokens) // BLOCK)


def test_a_text_that_was_computed_ahead_is_loaded_and_the_tokens_are_plain_vllms(
    cluster: Cluster, client: BatonClient, plain: Cluster
) -> None:
    text = text_prompt(600, 1) + "\n"
    made = client.cache_context(text=text, name="play", pin=True)
    assert made.blocks == made.total_blocks == kept_blocks(made.tokens) > 3
    assert made.pinned
    assert client.record(made.request_id or "").path["why"] == "one_token"
    restarted(cluster)
    question = "What says the king?\n"
    answer = client.generate_with_context(made, question, **SAMPLING)
    check_equal_to_plain(plain, answer, prompt=text + question)
    assert from_cache(client, answer) == kept_tokens(made.tokens)
    assert [part.reuse for part in answer.contexts] == ["prefix"]
    assert client.record(answer.request_id).contexts == list(answer.contexts)
    client.drop_context(made)


def test_parts_in_another_order_are_recomputed_and_said_to_be_and_the_answer_is_the_same(
    cluster: Cluster, client: BatonClient, plain: Cluster
) -> None:
    texts = [text_prompt(400, seed) + "\n" for seed in (2, 3)]
    a, b = (client.cache_context(text=text) for text in texts)
    restarted(cluster)
    first = client.generate_with_contexts([a, b], "Speak.", **SAMPLING)
    check_equal_to_plain(plain, first, prompt=texts[0] + texts[1] + "Speak.")
    assert [part.reuse for part in first.contexts] == ["prefix", "recomputed"]
    check_reused(cluster, client, first, a)
    turned = client.generate_with_contexts([b, a], "Speak.", **SAMPLING)
    check_equal_to_plain(plain, turned, prompt=texts[1] + texts[0] + "Speak.")
    assert [part.reuse for part in turned.contexts] == ["prefix", "recomputed"]
    check_reused(cluster, client, turned, b)  # of the part that comes second nothing
    again = client.generate_with_contexts([a, b], "And again.", **SAMPLING)
    assert [part.reuse for part in again.contexts] == ["prefix", "prefix"]
    record = client.record(again.request_id).tokens
    assert (record.from_cache or 0) + (record.found_locally or 0) >= (a.tokens + b.tokens) // BLOCK * BLOCK - BLOCK


def test_a_chats_contexts_are_rendered_as_they_were_ahead(
    cluster: Cluster, client: BatonClient, plain: Cluster
) -> None:
    text, turns = text_prompt(400, 4), chat_messages(300, 5)
    document = client.cache_context(text=text, endpoint="chat")
    turns += [{"role": "assistant", "content": "Ay, my lord."}]
    talk = client.cache_context(messages=turns)
    restarted(cluster)
    asked = [{"role": "user", "content": "Who is it?"}]
    for context, before in ((document, [{"role": "system", "content": text}]), (talk, turns)):
        answer = client.generate_with_context(context, asked, **SAMPLING)
        check_equal_to_plain(plain, answer, messages=before + asked)
        assert from_cache(client, answer) >= context.tokens // BLOCK * BLOCK > 0
        assert [part.reuse for part in answer.contexts] == ["prefix"]


def test_a_template_is_filled_and_its_constant_part_loaded(
    cluster: Cluster, client: BatonClient, plain: Cluster
) -> None:
    text = text_prompt(400, 6)
    template = client.template(text + "\n{{speaker}}:\n{{line}}")
    restarted(cluster)
    answers = client.batch(template, [{"speaker": "ROMEO", "line": "O"}, {"line": "A"}], **SAMPLING)
    assert isinstance(answers[0], Generation)
    check_equal_to_plain(plain, answers[0], prompt=f"{text}\nROMEO:\nO")
    assert from_cache(client, answers[0]) == kept_tokens(template.context.tokens) > 0
    assert isinstance(answers[1], Exception)
    assert "missing: speaker" in str(answers[1])


def test_another_tenant_finds_nothing_and_what_was_dropped_is_computed_again(
    cluster: Cluster, client: BatonClient, plain: Cluster
) -> None:
    text = text_prompt(500, 7) + "\n"
    with BatonClient(cluster.url, api_key="sk-ours") as ours, BatonClient(cluster.url, api_key="sk-theirs") as theirs:
        made = ours.cache_context(text=text, name="mine")
        for stranger in (theirs, client):
            with pytest.raises(ContextNotFound):
                stranger.generate_with_context(made, "?", **SAMPLING)
            with pytest.raises(ContextNotFound):
                stranger.drop_context(made)
            assert made.id not in [context.id for context in stranger.contexts()]
        restarted(cluster)
        kept = ask_figures(str(cluster.cache.socket))["blocks"]
        assert from_cache(theirs, theirs.generate(text + "?", **SAMPLING)) == 0
        assert from_cache(ours, ours.generate(text + "!", **SAMPLING)) == kept_tokens(made.tokens)
        _settled(cluster)
        ours.drop_context(made)
        assert made.id not in [label.name for label in labels(str(cluster.cache.socket))]
        restarted(cluster)
        answer = ours.generate(text + "?", **SAMPLING)
        assert from_cache(ours, answer) == 0, f"{kept} blocks were there"
        check_equal_to_plain(plain, answer, prompt=text + "?")
        with pytest.raises(ContextNotFound):
            ours.generate_with_context(made, "?", **SAMPLING)


def test_contexts_outlive_the_proxy(cluster: Cluster, client: BatonClient) -> None:
    made = client.cache_context(text=text_prompt(300, 8), name="outlives")
    cluster.proxy.kill_group()
    until(lambda: cluster.proxy.exit_code() is not None, what="the proxy's end")
    cluster.proxy.start()
    cluster.wait_ready(60.0)
    assert client.context(made.id).blocks == made.blocks
    assert [part.id for part in client.generate_with_context(made, "?", **SAMPLING).contexts] == [made.id]


def _settled(cluster: Cluster) -> None:
    until(lambda: ask_figures(str(cluster.cache.socket))["reserved_bytes"] == 0, what="the last commit")


@pytest.mark.parametrize(
    ("name", "shown"),
    [("chat", "> And what will he do now?"), ("rag", "richard-iii: prefix"), ("batch", "FOURTH CITIZEN: Mark'd ye")],
)
def test_every_example_runs_and_loads_what_it_computed_ahead(cluster: Cluster, name: str, shown: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / f"{name}.py"), "--url", cluster.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
    assert "blocks are kept" in done.stdout
    told = [line for line in done.stdout.splitlines() if "prompt tokens:" in line]
    assert told, done.stdout
    assert not all(" 0 from the cache, 0 found locally" in line for line in told), told


def test_warm_makes_a_context_of_each_line(cluster: Cluster, client: BatonClient, tmp_path: Any) -> None:
    text = tmp_path / "play.txt"
    text.write_text(text_prompt(300, 9))
    lines = tmp_path / "more.jsonl"
    lines.write_text('{"messages": [{"role": "user", "content": "Speak."}], "name": "short"}\n')
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "baton", "cache", "warm", str(text), str(lines), "--url", cluster.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    named = {context.name: context for context in client.contexts()}
    play: Context = named["play.txt"]
    assert play.blocks == kept_blocks(play.tokens) > 0
    assert f"[1/2] play.txt {play.id}: {play.tokens:,} tokens" in done.stdout
    assert "[2/2] short" in done.stdout
