"""From a body that names contexts to the ordinary body that says the same, for instances that know nothing of them.

    {"context_ids": [A, B], "messages": [q]}                    ──▶ {"messages": [A..., B..., q]}
    {"context_ids": [A, B], "prompt": "q"}                      ──▶ {"prompt": "ABq"}
    {"context": {"id": T, "variables": {...}}, "prompt": "q"}   ──▶ {"prompt": "Tq"}, T with its variables filled in

Pure functions. Both legs get the composed body, so both engines see one prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from proxy.body import ClientBody
from proxy.contexts import Context, Kind, messages_of
from proxy.errors import RequestRefused
from proxy.placeholders import fill
from proxy.split import Endpoint

OWN_FIELDS = ("context_ids", "context")
MAX_CONTEXTS = 64


class Part(msgspec.Struct, frozen=True):
    """One context as it enters a prompt. value: a text or messages, its variables filled in."""

    context: Context
    value: str | list[dict[str, Any]]


def names_contexts(fields: dict[str, Any]) -> bool:
    """True if the body has a field of ours, also an empty one: instances must not see it."""
    return any(name in fields for name in OWN_FIELDS)


def parts_of(fields: dict[str, Any], find: Callable[[str], Context]) -> list[Part]:
    """What a body names, in order. Raises RequestRefused: 400, or what `find` raises for an id that is not known."""
    ids, filled = fields.get("context_ids"), fields.get("context")
    if ids is not None and filled is not None:
        raise RequestRefused("context_ids and context cannot be used together", param="context")
    if filled is not None:
        return [_filled_part(filled, find)]
    if ids is None:
        return []
    if not isinstance(ids, list) or not all(isinstance(item, str) for item in ids) or len(ids) > MAX_CONTEXTS:
        raise RequestRefused(f"context_ids must be a list of at most {MAX_CONTEXTS} ids", param="context_ids")
    return [_plain_part(find(context_id)) for context_id in ids]


def composed(endpoint: Endpoint, body: ClientBody, parts: Sequence[Part]) -> ClientBody:
    """The ordinary body. Raises RequestRefused (400) if the parts do not fit this endpoint, the body or each other."""
    fields = {name: value for name, value in body.fields.items() if name not in OWN_FIELDS}
    if parts:
        fields |= _rendering(fields, parts)
        fields |= _chat(fields, parts) if endpoint is Endpoint.CHAT else _completion(fields, parts)
    return ClientBody(fields, json.dumps(fields, separators=(",", ":")).encode())


def _plain_part(context: Context) -> Part:
    if context.content.kind is Kind.TEMPLATE:
        raise RequestRefused(
            f'{context.id} is a template: name it as "context": {{"id": "{context.id}", "variables": {{...}}}}',
            param="context_ids",
        )
    return Part(context, context.content.value)


def _filled_part(named: object, find: Callable[[str], Context]) -> Part:
    if not isinstance(named, dict) or not isinstance(named.get("id"), str) or named.keys() - {"id", "variables"}:
        raise RequestRefused('context must be {"id": "ctx-...", "variables": {...}}', param="context")
    context = find(named["id"])
    if context.content.kind is not Kind.TEMPLATE:
        raise RequestRefused(f'{context.id} is no template: name it in "context_ids"', param="context")
    return Part(context, fill(context.content.value, named.get("variables") or {}))


def _rendering(fields: dict[str, Any], parts: Sequence[Part]) -> dict[str, Any]:
    """What the contexts were rendered with and the body does not say itself."""
    added: dict[str, Any] = {}
    for part in parts:
        for name, value in part.context.content.rendering.items():
            if added.setdefault(name, value) != value:
                raise RequestRefused(
                    f"the contexts were made with different {name}; give {name} in the request", param="context_ids"
                )
    return {name: value for name, value in added.items() if fields.get(name) is None}


def _chat(fields: dict[str, Any], parts: Sequence[Part]) -> dict[str, Any]:
    own = fields.get("messages")
    if own is not None and not isinstance(own, list):
        raise RequestRefused("messages must be a list", param="messages")
    before = [message for part in parts for message in messages_of(part.value, part.context.content.role)]
    return {"messages": before + (own or [])}


def _completion(fields: dict[str, Any], parts: Sequence[Part]) -> dict[str, Any]:
    own = fields.get("prompt")
    if own is not None and not isinstance(own, str):
        raise RequestRefused("with contexts the prompt must be a text", param="prompt")
    texts = []
    for part in parts:
        if not isinstance(part.value, str):
            raise RequestRefused(
                f"{part.context.id} is made of messages: use it on /v1/chat/completions", param="context_ids"
            )
        texts.append(part.value)
    return {"prompt": "".join(texts) + (own or "")}
