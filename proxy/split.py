"""Which requests are handed off, and what the prefill instance is sent. Pure functions over a parsed body.

A request that cannot be handed off exactly goes to a decode instance alone, with the reason in its record. The reasons
are words of this file; one with a variable part has it behind a colon (`unknown_field:NAME`).

Values are judged leniently (a body that vLLM will reject must not be rejected here in other words): whatever is not
understood goes to D as the client wrote it, and D answers for it.
"""

from __future__ import annotations

import enum
from typing import Any

from core.handoff import Handoff
from proxy.fields import CHAT, COMPLETION, LEGACY, Kind

Body = dict[str, Any]


class Endpoint(enum.Enum):
    """The two endpoints that generate from a prompt and are split; the value is the path."""

    CHAT = "/v1/chat/completions"
    COMPLETION = "/v1/completions"


FIELDS = {Endpoint.CHAT: CHAT, Endpoint.COMPLETION: COMPLETION}

_TEXT_PARTS = ("text", "input_text", "output_text", "refusal", "thinking", "tool_reference")
_MEDIA_KEYS = frozenset(
    {"image_url", "image_pil", "image_embeds", "input_image", "audio_url", "input_audio", "audio_embeds"}
    | {"video_url", "video_embeds", "prompt_embeds", "file"}
)
_BYTES_PER_TOKEN = 4
"""For `is_short` alone: about four bytes of English text become one token."""


def output_cap(endpoint: Endpoint, body: Body) -> object:
    """The client's cap on output tokens under whichever name counts for vLLM, or None."""
    if endpoint is Endpoint.CHAT and body.get("max_completion_tokens") is not None:
        return body["max_completion_tokens"]
    return body.get("max_tokens")


def wants_one_token(endpoint: Endpoint, body: Body) -> bool:
    """True if the whole answer is one token: there is nothing left to decode, so P may give it alone."""
    cap = output_cap(endpoint, body)
    return type(cap) is int and cap == 1


def why_not_handed_off(endpoint: Endpoint, body: Body) -> str | None:
    """The reason for which this request must go to D alone, or None if it may be handed off."""
    for name in body:
        if name not in FIELDS[endpoint] and name not in LEGACY and body[name] is not None:
            return f"unknown_field:{ascii(name[:64])[1:-1]}"
    return _sampling_reason(endpoint, body) or _prompt_reason(endpoint, body)


def _sampling_reason(endpoint: Endpoint, body: Body) -> str | None:
    """Ways of generating that read the prompt's forward pass, or turn one request into several."""
    if body.get("n") not in (None, 1) or body.get("best_of") not in (None, 1):
        return "several_choices"
    if body.get("prompt_logprobs") is not None:
        return "prompt_logprobs"
    if body.get("echo"):
        return "echo"
    if body.get("use_beam_search"):
        return "beam_search"
    if body.get("routed_experts_prompt_start"):
        return "routed_experts"
    cap = output_cap(endpoint, body)
    if cap is not None and (type(cap) is not int or cap < 1):
        return "no_output"
    return None


def _prompt_reason(endpoint: Endpoint, body: Body) -> str | None:
    if endpoint is Endpoint.CHAT:
        return "multimodal" if _has_media(body.get("messages")) else None
    if body.get("prompt_embeds") is not None:
        return "prompt_embeds"
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return None
    if not isinstance(prompt, list) or not prompt:
        return "malformed_prompt"
    if all(type(item) is int for item in prompt):
        return None
    return "several_prompts" if len(prompt) > 1 else None


def _has_media(messages: object) -> bool:
    """True if any part of any message is not text."""
    if not isinstance(messages, list):
        return False
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, dict):
                continue
            if not _MEDIA_KEYS.isdisjoint(part) or part.get("type", "text") not in _TEXT_PARTS:
                return True
    return False


def is_short(body: Body, threshold_tokens: int) -> bool:
    """True if the prompt is surely shorter than the threshold, by an estimate that needs no tokenizer."""
    return threshold_tokens > 0 and _estimate_tokens(body) < threshold_tokens


def _estimate_tokens(body: Body) -> int:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if isinstance(prompt, list):
        return len(prompt)
    text_bytes = _text_bytes(prompt) + _text_bytes(body.get("messages")) + _text_bytes(body.get("tools"))
    return text_bytes // _BYTES_PER_TOKEN


def _text_bytes(value: object) -> int:
    """Bytes of all strings inside a parsed JSON value, keys left out."""
    total, rest = 0, [value]
    while rest:
        item = rest.pop()
        if isinstance(item, str):
            total += len(item.encode(errors="replace"))
        elif isinstance(item, list):
            rest.extend(item)
        elif isinstance(item, dict):
            rest.extend(item.values())
    return total


def prefill_body(endpoint: Endpoint, body: Body, handoff: Handoff) -> Body:
    """The copy for P: the same prompt, one greedy token, not streamed, and the ticket."""
    fields = FIELDS[endpoint]
    copy = {name: value for name, value in body.items() if fields.get(name) is Kind.PROMPT}
    if endpoint is Endpoint.COMPLETION:
        copy["prompt"] = body.get("prompt")
    cap_name = "max_tokens"
    if endpoint is Endpoint.CHAT and body.get("max_completion_tokens") is not None:
        cap_name = "max_completion_tokens"
    copy |= {cap_name: 1, "n": 1, "stream": False, "temperature": 0.0}
    if endpoint is Endpoint.CHAT and body.get("tools"):
        copy["tool_choice"] = _prefill_tool_choice(body)
    copy["kv_transfer_params"] = handoff.to_params()
    return copy


def _prefill_tool_choice(body: Body) -> str | None:
    """`none` stays (a server may then leave the tools out of the prompt); everything else becomes null.

    An explicit null renders the tools as `auto`, `required` and a named tool do, and adds no grammar. Leaving the key
    out would not do: vLLM then puts `auto`, which some tool parsers turn into a grammar.
    """
    return "none" if body.get("tool_choice") == "none" else None
