"""A client that keeps what a test compares: token ids, text, finish reason, usage, and the proxy's record."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import requests

TIMEOUT_S = 100.0


@dataclass
class Answer:
    """One response. choices: per index (token ids, text, finish reason)."""

    request_id: str
    tokens: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    finish: dict[int, str | None] = field(default_factory=dict)
    logprobs: list[float] = field(default_factory=list)
    usage: dict[str, Any] | None = None

    def outcome(self) -> tuple[object, ...]:
        """What must be equal between two servers."""
        return (self.tokens, self.text, self.finish)


def ask(url: str, body: dict[str, Any]) -> Answer:
    """One request, chat if it has messages; raises AssertionError with the body of an error."""
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    body = {"model": "baton-demo", "temperature": 0, "return_token_ids": True, **body}
    response = requests.post(url + path, json=body, timeout=TIMEOUT_S, stream=bool(body.get("stream")))
    assert response.status_code == 200, f"{response.status_code}: {response.text}"
    answer = Answer(response.headers.get("x-request-id", ""))
    if body.get("stream"):
        for event in _events(response.iter_lines()):
            _add(answer, event)
    else:
        _add(answer, response.json())
    return answer


def ask_all(url: str, bodies: Sequence[dict[str, Any]], concurrency: int) -> list[Answer]:
    """All of them, in order, so many at a time."""
    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(lambda body: ask(url, body), bodies))


def record(url: str, answer: Answer) -> dict[str, Any]:
    """What the proxy says about one request."""
    response = requests.get(f"{url}/requests/{answer.request_id}", timeout=TIMEOUT_S)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


def metric(url: str, name: str) -> float:
    """The sum over all labels of one metric of the proxy."""
    lines = requests.get(f"{url}/metrics", timeout=TIMEOUT_S).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " ")))


def _events(lines: Iterable[bytes]) -> Iterable[dict[str, Any]]:
    ended = False
    for line in lines:
        if line == b"data: [DONE]":
            ended = True
        elif line.startswith(b"data: "):
            event = json.loads(line[6:])
            assert "error" not in event, event
            yield event
    assert ended, "the stream ended without [DONE]"


def _add(answer: Answer, event: dict[str, Any]) -> None:
    answer.usage = event.get("usage") or answer.usage
    for choice in event["choices"]:
        index = choice["index"]
        message = choice.get("message") or choice.get("delta") or choice
        text = message.get("content") or message.get("text") or ""
        answer.tokens.setdefault(index, []).extend(choice.get("token_ids") or [])
        answer.text[index] = answer.text.get(index, "") + text
        answer.finish[index] = choice.get("finish_reason") or answer.finish.get(index)
        answer.logprobs.extend(_logprobs(choice.get("logprobs")))


def _logprobs(logprobs: dict[str, Any] | None) -> list[float]:
    if not logprobs:
        return []
    if "content" in logprobs:
        return [entry["logprob"] for entry in logprobs["content"] or []]
    return [value for value in logprobs["token_logprobs"] if value is not None]
