"""Every question to the server: what is sent, and how its answer is read. Shared by both clients; no I/O here.

cache_context(fields) ──▶ Operation[Context]: method, path, body, parse
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypedDict, TypeVar, Unpack

import msgspec

from client.answers import Context, ContextReuse, Generation, Record, Usage
from client.errors import BatonClientError, error_of
from client.templates import Filled

Messages = list[dict[str, Any]]
Prompt = str | Messages | Filled
"""A text (of a completion, or a chat's question behind a chat's contexts), messages of a chat, or a filled template."""

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
T = TypeVar("T")
A = TypeVar("A")


class Answer(msgspec.Struct, frozen=True):
    """What came back, whole. Header names are in small letters."""

    status: int
    headers: dict[str, str]
    body: bytes


class Operation(msgspec.Struct, Generic[T], frozen=True):
    """One question. headers: beside those of every question of this client."""

    method: str
    path: str
    parse: Callable[[Answer], T]
    body: dict[str, Any] | None = None
    headers: dict[str, str] = {}

    def read(self, answer: Answer) -> T:
        """Raises BatonClientError if the answer is an error, or is none of this server's."""
        if answer.status >= 400:
            raise error_of(answer.status, answer.headers, answer.body)
        try:
            return self.parse(answer)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            message = f"{self.method} {self.path} was answered by something that is not Baton: {error!r}"
            raise BatonClientError(message, answer.status, answer.headers) from error


class TemplateFields(TypedDict, total=False):
    """What a context may have beside its content; see docs/contexts.md."""

    name: str
    ttl_s: float
    pin: bool
    endpoint: str
    role: str
    tools: list[dict[str, Any]]
    chat_template_kwargs: dict[str, Any]


class ContextFields(TemplateFields, total=False):
    """What `cache_context` takes: exactly one of text, messages and template, and what TemplateFields has."""

    text: str
    messages: Messages
    template: str | Messages


class Defaults(msgspec.Struct, frozen=True):
    """What every body of one client has unless a call says otherwise."""

    model: str | None = None
    cache_salt: str | None = None

    def fields(self) -> dict[str, Any]:
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}

    def headers(self) -> dict[str, str]:
        """For questions without a body."""
        return {"x-cache-salt": self.cache_salt} if self.cache_salt is not None else {}

    def cache_context(self, **fields: Unpack[ContextFields]) -> Operation[Context]:
        """Makes a context, or renews the one of this name."""
        return Operation("POST", "/v1/contexts", _context, self.fields() | dict(fields))

    def contexts(self) -> Operation[list[Context]]:
        return Operation("GET", "/v1/contexts", _contexts, headers=self.headers())

    def context(self, context_id: str) -> Operation[Context]:
        return Operation("GET", f"/v1/contexts/{context_id}", _context, headers=self.headers())

    def drop_context(self, context: Context | str) -> Operation[None]:
        return Operation("DELETE", f"/v1/contexts/{id_of(context)}", lambda _: None, headers=self.headers())

    def record(self, request_id: str) -> Operation[Record]:
        return Operation("GET", f"/requests/{request_id}", lambda answer: msgspec.json.decode(answer.body, type=Record))

    def generate(
        self, prompt: Prompt, contexts: Sequence[Context | str], sampling: Mapping[str, Any]
    ) -> Operation[Generation]:
        """One answer, or with `stream` in `sampling` a stream of them, which `client.events` reads."""
        body = self.fields() | dict(sampling)
        more: str | Messages = prompt.more if isinstance(prompt, Filled) else prompt
        if isinstance(prompt, Filled):
            if contexts:
                raise BatonClientError("a filled template and further contexts cannot be used together")
            body["context"] = {"id": prompt.context.id, "variables": prompt.variables}
            contexts = [prompt.context]
        elif contexts:
            body["context_ids"] = [id_of(context) for context in contexts]
        if isinstance(more, str) and not any(_is_chat(context) for context in contexts):
            return Operation("POST", COMPLETION, generation_of, body | {"prompt": more})
        return Operation("POST", CHAT, generation_of, body | {"messages": _messages(more)})


def id_of(context: Context | str) -> str:
    return context if isinstance(context, str) else context.id


def _is_chat(context: Context | str) -> bool:
    return isinstance(context, Context) and context.endpoint == "chat"


def _messages(more: str | Messages) -> Messages:
    if not isinstance(more, str):
        return more
    return [{"role": "user", "content": more}] if more else []


def _context(answer: Answer) -> Context:
    return msgspec.json.decode(answer.body, type=Context)


def _contexts(answer: Answer) -> list[Context]:
    return msgspec.convert(json.loads(answer.body)["data"], list[Context])


def generation_of(answer: Answer) -> Generation:
    """From a whole answer."""
    body = json.loads(answer.body)
    choice = body["choices"][0]
    usage = body.get("usage")
    text = choice["message"].get("content") if "message" in choice else choice["text"]
    return Generation(
        text=text or "",
        request_id=answer.headers.get("x-request-id", ""),
        finish_reason=choice.get("finish_reason"),
        usage=msgspec.convert(usage, Usage) if usage else None,
        contexts=reuse_of(answer.headers),
        token_ids=tuple(choice.get("token_ids") or ()),
        body=body,
    )


def reuse_of(headers: Mapping[str, str]) -> tuple[ContextReuse, ...]:
    """What the server says of the contexts that were named."""
    told = headers.get("x-baton-contexts", "")
    pairs = [item.strip().partition("=") for item in told.split(",") if item.strip()]
    return tuple(ContextReuse(context_id, reuse) for context_id, _, reuse in pairs)
