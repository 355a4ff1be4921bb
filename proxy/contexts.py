"""A context: a text, messages or a template whose KV cache is computed before anybody asks about it.

    POST /v1/contexts ──▶ Content ──▶ body of an ordinary one-token request, with a label ──▶ its blocks in the cache
    a request that names it ──▶ the same text or messages put before the client's own ──▶ a prefix that is there

The context's id is the label's name. Facts only; no I/O, no state.
"""

from __future__ import annotations

import difflib
import enum
import json
from typing import Any

import msgspec

from core.handoff import Label
from proxy.errors import RequestRefused
from proxy.placeholders import constant_messages, constant_text, variables_of
from proxy.split import Endpoint

MAX_NAME = 128
MAX_TTL_S = 10 * 365 * 86400.0
RENDERING = ("tools", "documents", "chat_template_kwargs", "reasoning_effort", "add_special_tokens")
"""Fields beside text and messages that decide which tokens stand at a prompt's beginning: a context keeps them, and a
request that names it and does not give them itself gets them."""

_ENDPOINTS = {"chat": Endpoint.CHAT, "completion": Endpoint.COMPLETION}
_KNOWN = ("text", "messages", "template", "name", "ttl_s", "pin", "model", "cache_salt", "endpoint", "role", *RENDERING)


class Kind(enum.Enum):
    """What a context was made from."""

    TEXT = "text"
    MESSAGES = "messages"
    TEMPLATE = "template"


class Content(msgspec.Struct, frozen=True):
    """What is kept. value: a text, or messages. endpoint: for which prompts it is computed ahead. role: whose message a
    text becomes in a chat. rendering: see RENDERING."""

    kind: Kind
    endpoint: Endpoint
    value: str | list[dict[str, Any]]
    role: str = "system"
    model: str | None = None
    rendering: dict[str, Any] = {}

    @property
    def variables(self) -> list[str]:
        return variables_of(self.value) if self.kind is Kind.TEMPLATE else []

    @property
    def num_bytes(self) -> int:
        """What it takes in the proxy's memory, as JSON."""
        return len(json.dumps([self.value, self.rendering]))

    def body(self, cache_salt: str | None) -> dict[str, Any] | None:
        """The request that computes it, or what of a template is the same in every request; None: nothing is."""
        value = self._constant()
        if not value:
            return None
        body: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0} | self.rendering
        if self.endpoint is Endpoint.COMPLETION:
            body["prompt"] = value
        else:
            body["messages"] = messages_of(value, self.role)
            body["add_generation_prompt"] = False
            if self.rendering.get("tools"):
                body["tool_choice"] = None
        optional = {"model": self.model, "cache_salt": cache_salt}
        return body | {name: given for name, given in optional.items() if given is not None}

    def _constant(self) -> str | list[dict[str, Any]]:
        if self.kind is not Kind.TEMPLATE:
            return self.value
        return constant_text(self.value) if isinstance(self.value, str) else constant_messages(self.value)


class Wish(msgspec.Struct, frozen=True):
    """A parsed `POST /v1/contexts`."""

    content: Content
    name: str | None = None
    ttl_s: float = 0.0
    pin: bool = False

    def label(self, context_id: str) -> Label:
        return Label(context_id, ttl_s=self.ttl_s, pin=self.pin)


class Context(msgspec.Struct, frozen=True):
    """One context. tenant: the salt of those who may use it; None: of everyone without a salt. tokens: of the prompt
    that was computed. num_blocks: how many blocks of KV that is. deadline_s: unix seconds, 0: none."""

    id: str
    wish: Wish
    tenant: str | None
    created_s: float
    deadline_s: float = 0.0
    tokens: int = 0
    num_blocks: int = 0
    model: str = ""

    @property
    def content(self) -> Content:
        return self.wish.content


def messages_of(value: str | list[dict[str, Any]], role: str) -> list[dict[str, Any]]:
    """As messages of a chat."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def parse_wish(fields: dict[str, Any]) -> Wish:
    """Raises RequestRefused (400) with the field's name and what it should be."""
    _check_fields(fields)
    name, ttl_s, pin = fields.get("name"), fields.get("ttl_s"), fields.get("pin")
    if name is not None and (not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable()):
        raise _wrong("name", f"name must be 1 to {MAX_NAME} printable characters")
    if ttl_s is not None and (type(ttl_s) not in (int, float) or not 0 < ttl_s <= MAX_TTL_S):
        raise _wrong("ttl_s", "ttl_s must be a number of seconds above 0; leave it out for no limit")
    if pin is not None and not isinstance(pin, bool):
        raise _wrong("pin", "pin must be true or false")
    return Wish(_content(fields), name, float(ttl_s or 0.0), bool(pin))


def _check_fields(fields: dict[str, Any]) -> None:
    for field in fields:
        if field not in _KNOWN:
            near = difflib.get_close_matches(field, _KNOWN, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(_KNOWN)}"
            raise _wrong(field[:64], f"unknown field {field[:64]!a}; {hint}")
    try:
        msgspec.json.encode(fields)
    except (UnicodeEncodeError, OverflowError, msgspec.EncodeError) as error:
        raise _wrong(None, f"a context must be plain JSON in Unicode: {ascii(str(error))[1:-1]}") from error


def _content(fields: dict[str, Any]) -> Content:
    given = [kind for kind in Kind if fields.get(kind.value) is not None]
    if len(given) != 1:
        raise _wrong(None, "exactly one of text, messages and template is needed")
    kind = given[0]
    value = fields[kind.value]
    is_text = isinstance(value, str) and kind is not Kind.MESSAGES
    if not (is_text or (_are_messages(value) and kind is not Kind.TEXT)) or not value:
        wanted = {
            Kind.TEXT: "a text",
            Kind.MESSAGES: "a list of messages",
            Kind.TEMPLATE: "a text or a list of messages",
        }
        raise _wrong(kind.value, f"{kind.value} must be {wanted[kind]}, and not empty")
    model = fields.get("model")
    if model is not None and not isinstance(model, str):
        raise _wrong("model", "model must be a name")
    rendering = {name: fields[name] for name in RENDERING if fields.get(name) is not None}
    endpoint = _endpoint(fields, is_text)
    if endpoint is Endpoint.COMPLETION and rendering.keys() - {"add_special_tokens"}:
        chats = min(rendering.keys() - {"add_special_tokens"})
        raise _wrong(chats, f'{chats} is a field of chats; add "endpoint": "chat"')
    return Content(kind, endpoint, value, _role(fields, kind, is_text), model, rendering)


def _endpoint(fields: dict[str, Any], is_text: bool) -> Endpoint:
    named = fields.get("endpoint")
    if named is None:
        is_chat = not is_text or fields.get("role") is not None
        return Endpoint.CHAT if is_chat else Endpoint.COMPLETION
    if named not in _ENDPOINTS:
        raise _wrong("endpoint", 'endpoint must be "chat" or "completion"')
    if not is_text and named != "chat":
        raise _wrong("endpoint", "messages are computed for chats only; a completion takes a text")
    return _ENDPOINTS[named]


def _role(fields: dict[str, Any], kind: Kind, is_text: bool) -> str:
    """A document is the system's word, a filled template is what the user says."""
    role = fields.get("role")
    if role is None:
        return "user" if kind is Kind.TEMPLATE else "system"
    if not is_text or role not in ("system", "user"):
        raise _wrong("role", 'role must be "system" or "user", and only a text has one')
    return str(role)


def _are_messages(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) and "role" in item for item in value)


def _wrong(param: str | None, message: str) -> RequestRefused:
    return RequestRefused(message, param=param, code="invalid_context")
