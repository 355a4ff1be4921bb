"""What clients ask for beyond greedy text is equal to plain vLLM too, handed off or not."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.launcher import Cluster
from tests.engine.client import ask, record
from tests.engine.clusters import CHUNKED
from tests.engine.prompts import chat_messages, token_prompt

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def pair(shared_cluster: Any) -> Cluster:
    cluster: Cluster = shared_cluster("1P1D", *CHUNKED, transport="shm")
    return cluster


def prompt(seed: int, num_tokens: int = 400) -> dict[str, Any]:
    return {"prompt": token_prompt(num_tokens, 60_000 + seed), "max_tokens": 12}


def chat(seed: int, num_tokens: int = 400) -> dict[str, Any]:
    return {"messages": chat_messages(num_tokens, 61_000 + seed), "max_tokens": 12}


SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}}, "required": ["name"]}

CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "seed": ({**prompt(1), "temperature": 1.2, "seed": 7, "ignore_eos": True}, True),
    "seed-in-several-steps": ({**prompt(13, 1300), "temperature": 1.2, "seed": 11, "ignore_eos": True}, True),
    "seed-chat-stream": ({**chat(1), "temperature": 0.9, "top_p": 0.9, "seed": 3, "stream": True}, True),
    "stop": ({**prompt(2), "max_tokens": 60, "stop": ["e", "\n"]}, True),
    "stop-token": ({**prompt(3), "max_tokens": 40, "stop_token_ids": list(range(200, 700))}, True),
    "logprobs": ({**prompt(4), "logprobs": 3, "ignore_eos": True}, True),
    "logprobs-chat": ({**chat(4), "logprobs": True, "top_logprobs": 2}, True),
    "n": ({**prompt(5), "n": 2, "temperature": 1.0, "seed": 5}, False),
    "n-chat": ({**chat(5), "n": 2, "temperature": 1.0, "seed": 5}, False),
    "several-prompts": (
        {"prompt": [token_prompt(300, 62_000), token_prompt(40, 62_001)], "max_tokens": 6, "ignore_eos": True},
        False,
    ),
    "echo": ({**prompt(6, 150), "echo": True}, False),
    "structured": (
        {
            **chat(7),
            "max_tokens": 40,
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
        },
        True,
    ),
    "min-tokens": ({**prompt(8), "min_tokens": 8}, True),
    "penalties": ({**prompt(9), "repetition_penalty": 1.3, "presence_penalty": 0.4, "ignore_eos": True}, True),
    "one-token": ({**prompt(10), "max_tokens": 1}, False),
    "one-token-chat": ({**chat(10), "max_tokens": 1}, False),
    "truncated": ({**prompt(11, 700), "truncate_prompt_tokens": 300, "ignore_eos": True}, True),
    "cache-salt": ({**prompt(12), "cache_salt": "tenant-a", "ignore_eos": True}, True),
    "logit-bias": ({**prompt(13), "logit_bias": {"300": 5.0}, "ignore_eos": True}, True),
}


@pytest.mark.parametrize("name", CASES)
def test_equal_to_plain_vllm(pair: Cluster, plain: Cluster, name: str) -> None:
    body, is_handed_off = CASES[name]
    ours, theirs = ask(pair.url, body), ask(plain.url, body)
    assert ours.outcome() == theirs.outcome()
    assert ours.logprobs == pytest.approx(theirs.logprobs, abs=2e-4)
    assert ours.usage == theirs.usage
    entry = record(pair.url, ours)
    assert (entry["tokens"]["handed_over"] or 0) > 0 if is_handed_off else entry["path"]["why"], entry


def test_end_of_text_as_the_first_token(pair: Cluster, plain: Cluster) -> None:
    """P's one token is the end: the hand-off still happens, and D ends the answer itself."""
    body = {**prompt(20), "logit_bias": {"3": 100.0}, "max_tokens": 12}
    ours, theirs = ask(pair.url, body), ask(plain.url, body)
    assert ours.outcome() == theirs.outcome()
    assert ours.finish[0] == "stop"
    assert record(pair.url, ours)["tokens"]["handed_over"] == 399


def test_usage_is_streamed_on_request(pair: Cluster, plain: Cluster) -> None:
    body = {**prompt(21), "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    ours, theirs = ask(pair.url, body), ask(plain.url, body)
    assert ours.usage is not None
    assert ours.usage == theirs.usage
    assert ours.usage["prompt_tokens"] == 400
