"""The official client talks to the proxy as to any OpenAI server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

from tests.fakes.engine import FakeEngine
from tests.proxy.fleet import Fleet, until

Pair = tuple[FakeEngine, FakeEngine]
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]


@pytest.fixture
def client(fleet: Fleet, pair: Pair) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="key", max_retries=0) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=MESSAGES, max_completion_tokens=3)
    assert answer.choices[0].message.content == " t0 t1 t2"
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.usage.prompt_tokens_details) == (3, None)


def test_chat_with_tools(client: openai.OpenAI, pair: Pair) -> None:
    tools: list[ChatCompletionToolParam] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    pair[1].behaviour.hold = True
    fields: dict[str, Any] = {"tools": tools, "tool_choice": "required", "max_tokens": 3}
    asking = threading.Thread(
        target=lambda: client.chat.completions.create(model="fake", messages=MESSAGES, **fields), daemon=True
    )
    asking.start()
    until(lambda: pair[0].received and pair[1].received, "both legs have it")
    pair[1].behaviour.hold = False
    asking.join(5)
    assert pair[1].received[0].body["tool_choice"] == "required"
    assert pair[0].received[0].body["tools"] == tools


def test_chat_streamed_with_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="fake", messages=MESSAGES, max_tokens=3, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == " t0 t1 t2"
    assert last.usage is not None


def test_completions_streamed_and_not(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt="hello", max_tokens=2)
    assert answer.choices[0].text == " t0 t1"
    stream = client.completions.create(model="fake", prompt="hello", max_tokens=2, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == " t0 t1"


def test_two_choices(client: openai.OpenAI, pair: Pair) -> None:
    answer = client.chat.completions.create(model="fake", messages=MESSAGES, n=2, max_tokens=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert pair[0].received == []


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]


def test_errors_are_the_clients_own_types(client: openai.OpenAI, pair: Pair) -> None:
    with pytest.raises(openai.BadRequestError, match="clients may not set"):
        client.completions.create(model="fake", prompt="x", extra_body={"kv_transfer_params": {"x": 1}})
    pair[1].behaviour.break_after = 1
    stream = client.completions.create(model="fake", prompt="hello", stream=True)
    with pytest.raises(openai.APIError, match="was lost"):
        list(stream)
    for engine in pair:
        engine.stop()
    for _ in range(2):
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="fake", prompt="x")
