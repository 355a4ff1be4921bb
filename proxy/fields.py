"""Every field of vLLM 0.32's two generation requests, and what the prefill copy does with it.

vLLM takes unknown fields silently, so a new one could change the prompt or the meaning of an answer without notice.
This table is therefore complete: `tests/proxy/test_fields.py` compares it with vLLM's own classes and fails by name.
Read in vLLM 0.32: `entrypoints/openai/{chat_completion,completion}/protocol.py`, `renderers/online_renderer.py`.

    PROMPT   decides which tokens the prompt has, whose cache they may share, or when they are scheduled:
             the prefill copy keeps it as the client wrote it
    OUTPUT   decides only what is sampled or how it is shown: the prefill copy drops it, which also spares P a grammar
             compile, a seeded generator, and checks such as "min_tokens <= max_tokens"
    RULE     `proxy/split.py` has a rule of its own for it (the caps, tool_choice, what is never handed off)
    REFUSED  clients may not send it (`proxy/body.py`)

Two renderers of vLLM read more than their fellows: Kimi K3's template shows `tool_choice` and `response_format` to the
model. Where a client uses either there, P's prompt differs from D's, P declines at Accept by the prompt's hash, and D
computes: slower, never wrong.
"""

from __future__ import annotations

import enum


class Kind(enum.Enum):
    """What the prefill copy does with a field; see the table above."""

    PROMPT = "prompt"
    OUTPUT = "output"
    RULE = "rule"
    REFUSED = "refused"


def _all(kind: Kind, names: str) -> dict[str, Kind]:
    return dict.fromkeys(names.split(), kind)


_BOTH = {
    **_all(
        Kind.PROMPT,
        # which tokens
        "model truncate_prompt_tokens truncation_side add_special_tokens "
        # whose cache, and when
        "cache_salt priority session_id",
    ),
    **_all(
        Kind.OUTPUT,
        # sampling
        "temperature top_p top_k min_p seed frequency_penalty presence_penalty repetition_penalty length_penalty "
        "logit_bias allowed_token_ids bad_words watermarking min_tokens ignore_eos stop stop_token_ids "
        "include_stop_str_in_output repetition_detection thinking_token_budget vllm_xargs "
        # structure
        "response_format structured_outputs "
        # what is shown
        "logprobs logprob_token_ids return_tokens_as_token_ids return_token_ids return_token_offsets "
        "skip_special_tokens spaces_between_special_tokens stream_options stream_interval mm_payload return_mm_kwargs "
        # ignored by vLLM, or replaced by our header
        "user request_id",
    ),
    **_all(Kind.RULE, "stream n max_tokens echo use_beam_search prompt_logprobs routed_experts_prompt_start"),
    **_all(Kind.REFUSED, "kv_transfer_params ec_transfer_params"),
}

CHAT: dict[str, Kind] = {
    **_BOTH,
    **_all(
        Kind.PROMPT,
        "messages tools documents chat_template chat_template_kwargs add_generation_prompt continue_final_message "
        "reasoning_effort media_io_kwargs mm_processor_kwargs",
    ),
    **_all(Kind.OUTPUT, "top_logprobs include_reasoning parallel_tool_calls return_prompt_text"),
    **_all(Kind.RULE, "max_completion_tokens tool_choice"),
}

COMPLETION: dict[str, Kind] = {
    **_BOTH,
    **_all(Kind.PROMPT, "suffix"),
    **_all(Kind.RULE, "prompt prompt_embeds"),
}

LEGACY = frozenset({"best_of"})
"""Fields that vLLM no longer has and that `proxy/split.py` still has a rule for."""
