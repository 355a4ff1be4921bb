"""Which requests are handed off, and what P is sent."""

from __future__ import annotations

from typing import Any

import pytest

from core.handoff import Handoff, Peer, handoff_from_params
from proxy.split import Endpoint, is_short, prefill_body, wants_one_token, why_not_handed_off

CHAT, COMPLETION = Endpoint.CHAT, Endpoint.COMPLETION
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
PROMPT: dict[str, Any] = {"prompt": "hello"}
TICKET = Handoff("req-1", Peer("d", "tcp://d", "b1"), Peer("p", "tcp://p", "b2"))


def parts(*kinds: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(kinds)}]}


@pytest.mark.parametrize(
    ("endpoint", "body", "why"),
    [
        (CHAT, HELLO, None),
        (CHAT, HELLO | {"n": 1, "stream": True, "logprobs": True, "top_logprobs": 2, "seed": 3}, None),
        (CHAT, HELLO | {"n": None, "echo": False, "prompt_logprobs": None, "use_beam_search": False}, None),
        (CHAT, HELLO | {"n": 2}, "several_choices"),
        (CHAT, HELLO | {"best_of": 2}, "several_choices"),
        (CHAT, HELLO | {"best_of": 1}, None),
        (CHAT, HELLO | {"prompt_logprobs": 0}, "prompt_logprobs"),
        (CHAT, HELLO | {"echo": True}, "echo"),
        (CHAT, HELLO | {"use_beam_search": True}, "beam_search"),
        (CHAT, HELLO | {"routed_experts_prompt_start": 4}, "routed_experts"),
        (CHAT, HELLO | {"max_tokens": 0}, "no_output"),
        (CHAT, HELLO | {"max_tokens": "9"}, "no_output"),
        (CHAT, HELLO | {"max_tokens": 0, "max_completion_tokens": 4}, None),
        (CHAT, HELLO | {"tomorrows_field": 1}, "unknown_field:tomorrows_field"),
        (CHAT, HELLO | {"tomorrows_field": None}, None),
        (CHAT, HELLO | {"prompt": "a completion's field"}, "unknown_field:prompt"),
        (CHAT, {}, None),
        (CHAT, {"messages": "not a list"}, None),
        (CHAT, {"messages": ["not an object", {"content": ["text"]}]}, None),
        (CHAT, parts({"type": "text", "text": "a"}, {"text": "b"}, {"type": "thinking", "thinking": "c"}), None),
        (CHAT, parts({"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}), "multimodal"),
        (CHAT, parts({"type": "input_audio", "input_audio": {}}), "multimodal"),
        (CHAT, parts({"type": "video_url", "video_url": {}}), "multimodal"),
        (CHAT, parts({"image_url": "x"}), "multimodal"),
        (CHAT, parts({"type": "tomorrows_part"}), "multimodal"),
        (CHAT, parts({"type": ["odd"]}), "multimodal"),
        (COMPLETION, PROMPT, None),
        (COMPLETION, {"prompt": [1, 2, 3]}, None),
        (COMPLETION, {"prompt": ["hello"]}, None),
        (COMPLETION, {"prompt": [[1, 2, 3]]}, None),
        (COMPLETION, {"prompt": ["a", "b"]}, "several_prompts"),
        (COMPLETION, {"prompt": [[1], [2]]}, "several_prompts"),
        (COMPLETION, {"prompt": []}, "malformed_prompt"),
        (COMPLETION, {"prompt": None}, "malformed_prompt"),
        (COMPLETION, {"prompt": {"a": 1}}, "malformed_prompt"),
        (COMPLETION, PROMPT | {"prompt_embeds": "abc"}, "prompt_embeds"),
        (COMPLETION, PROMPT | {"n": 3}, "several_choices"),
        (COMPLETION, PROMPT | {"echo": True}, "echo"),
        (COMPLETION, PROMPT | {"suffix": "end", "logprobs": 3}, None),
        (COMPLETION, PROMPT | {"max_completion_tokens": 3}, "unknown_field:max_completion_tokens"),
    ],
)
def test_a_request_is_handed_off_or_says_why_not(endpoint: Endpoint, body: dict[str, Any], why: str | None) -> None:
    assert why_not_handed_off(endpoint, body) == why


@pytest.mark.parametrize(
    ("endpoint", "body", "one"),
    [
        (CHAT, HELLO | {"max_tokens": 1}, True),
        (CHAT, HELLO | {"max_completion_tokens": 1}, True),
        (CHAT, HELLO | {"max_completion_tokens": 1, "max_tokens": 9}, True),
        (CHAT, HELLO | {"max_completion_tokens": 9, "max_tokens": 1}, False),
        (CHAT, HELLO | {"max_completion_tokens": None, "max_tokens": 1}, True),
        (CHAT, HELLO, False),
        (CHAT, HELLO | {"max_tokens": True}, False),
        (COMPLETION, PROMPT | {"max_tokens": 1}, True),
        (COMPLETION, PROMPT, False),
    ],
)
def test_one_token_is_seen_under_whichever_name_counts(endpoint: Endpoint, body: dict[str, Any], one: bool) -> None:
    assert wants_one_token(endpoint, body) is one


ONLY_OUTPUT = {
    "min_tokens": 5,
    "logprobs": True,
    "top_logprobs": 3,
    "logprob_token_ids": [1],
    "stop": ["x"],
    "stop_token_ids": [1],
    "include_stop_str_in_output": True,
    "response_format": {"type": "json_object"},
    "structured_outputs": {"regex": "a"},
    "stream_options": {"include_usage": True},
    "temperature": 0.7,
    "seed": 1,
    "bad_words": ["no"],
    "vllm_xargs": {"x": 1},
    "return_token_ids": True,
    "request_id": "mine",
}
SHAPES_PROMPT = {
    "model": "an-adapter",
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "chat_template_kwargs": {"thinking": True},
    "chat_template": "x",
    "add_generation_prompt": False,
    "continue_final_message": True,
    "documents": [{"text": "d"}],
    "reasoning_effort": "low",
    "truncate_prompt_tokens": 9,
    "truncation_side": "left",
    "add_special_tokens": True,
    "cache_salt": "salt",
    "priority": 3,
}


def test_ps_copy_keeps_what_shapes_the_prompt_and_nothing_else() -> None:
    copy = prefill_body(CHAT, HELLO | SHAPES_PROMPT | ONLY_OUTPUT | {"stream": True, "n": 1, "max_tokens": 50}, TICKET)
    ticket = copy.pop("kv_transfer_params")
    one_token = {"max_tokens": 1, "n": 1, "stream": False, "temperature": 0.0, "tool_choice": None}
    assert copy == HELLO | SHAPES_PROMPT | one_token
    assert handoff_from_params(ticket) == TICKET


def test_a_completions_copy_keeps_prompt_and_suffix() -> None:
    copy = prefill_body(COMPLETION, {"prompt": [1, 2], "suffix": "s", "model": "m", "logprobs": 2}, TICKET)
    del copy["kv_transfer_params"]
    one_token = {"max_tokens": 1, "n": 1, "stream": False, "temperature": 0.0}
    assert copy == {"prompt": [1, 2], "suffix": "s", "model": "m"} | one_token


@pytest.mark.parametrize(
    ("caps", "sent"),
    [
        ({}, {"max_tokens": 1}),
        ({"max_tokens": 7}, {"max_tokens": 1}),
        ({"max_completion_tokens": 7}, {"max_completion_tokens": 1}),
        ({"max_completion_tokens": 7, "max_tokens": 3}, {"max_completion_tokens": 1}),
        ({"max_completion_tokens": None}, {"max_tokens": 1}),
    ],
)
def test_p_gets_one_token_by_the_name_the_client_used(caps: dict[str, Any], sent: dict[str, Any]) -> None:
    copy = prefill_body(CHAT, HELLO | caps, TICKET)
    assert {name: copy[name] for name in copy if name.startswith("max_")} == sent


@pytest.mark.parametrize(
    ("choice", "sent"),
    [
        ({"tool_choice": "none"}, "none"),
        ({"tool_choice": "auto"}, None),
        ({"tool_choice": "required"}, None),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, None),
        ({}, None),
    ],
)
def test_tools_stay_in_ps_prompt_without_the_grammar_of_a_forced_choice(choice: dict[str, Any], sent: object) -> None:
    copy = prefill_body(CHAT, HELLO | {"tools": SHAPES_PROMPT["tools"]} | choice, TICKET)
    assert copy["tools"] == SHAPES_PROMPT["tools"]
    assert copy["tool_choice"] == sent
    assert "tool_choice" in copy, "vLLM would put `auto` where the key is missing"


def test_without_tools_ps_copy_has_no_tool_choice() -> None:
    assert "tool_choice" not in prefill_body(CHAT, HELLO | {"tool_choice": "none"}, TICKET)


def test_the_clients_body_is_left_as_it_was() -> None:
    body = HELLO | {"max_tokens": 5}
    prefill_body(CHAT, body, TICKET)
    assert body == HELLO | {"max_tokens": 5}


@pytest.mark.parametrize(
    ("body", "threshold", "short"),
    [
        ({"prompt": "word " * 100}, 0, False),
        ({"prompt": "word " * 100}, 200, True),
        ({"prompt": "word " * 100}, 100, False),
        ({"prompt": [1] * 99}, 100, True),
        ({"prompt": [[1] * 100]}, 100, False),
        ({"messages": [{"role": "user", "content": "x" * 400}]}, 100, False),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 100, True),
    ],
)
def test_a_prompt_is_short_by_its_size(body: dict[str, Any], threshold: int, short: bool) -> None:
    assert is_short(body, threshold) is short
