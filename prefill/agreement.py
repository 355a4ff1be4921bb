"""Whether what D accepts is what P will compute: the same prompt, sizes that fit. Pure."""

from __future__ import annotations

from core.handoff import Peer
from core.layout import KVLayout
from core.prompt import Prompt
from transport.messages import Accept
from transport.runs import objection


def disagreement(me: Peer, layout: KVLayout, prompt: Prompt, accept: Accept, decode: Peer) -> str:
    """Why this Accept of `decode` does not fit the prompt, or us; empty if it does."""
    why = objection(layout, me.num_ranks, decode.num_ranks)
    if why or (accept.num_senders, len(accept.schemes)) != (me.num_ranks, decode.num_ranks):
        awaited = f"transports of {len(accept.schemes)} and awaits {accept.num_senders}"
        why = why or f"the receiving side offers {awaited}"
        return f"tensor parallel sizes: {me.name} has {me.num_ranks} ranks, {decode.name} {decode.num_ranks}: {why}"
    if (prompt.num_tokens, prompt.hash) != (accept.num_prompt_tokens, accept.prompt_hash):
        return (
            f"prompts differ: {me.name} has {prompt.num_tokens} tokens (hash {prompt.hash.hex()[:12]}), "
            f"{decode.name} has {accept.num_prompt_tokens} (hash {accept.prompt_hash.hex()[:12]})"
        )
    end_block = -(-accept.num_tokens // layout.block_size)
    is_sound = 0 <= accept.first_block < end_block and accept.num_tokens < prompt.num_tokens
    if not is_sound or len(accept.block_ids) != end_block - accept.first_block:
        span = f"{len(accept.block_ids)} blocks from {accept.first_block}"
        return f"impossible Accept: {span} for {accept.num_tokens} tokens"
    return ""
