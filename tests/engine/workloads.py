"""Four kinds of work in which prompts share beginnings, cut from the passage: small enough to be compared by token."""

from __future__ import annotations

from typing import Any

from tests.engine.prompts import text_of

MAX_TOKENS = 8

Body = dict[str, Any]


def chats(seed: int) -> list[Body]:
    """Two conversations of three turns; each turn repeats what was said before it."""
    result = []
    for who in range(2):
        messages = [{"role": "system", "content": f"You are player {who} of cast {seed}. " + text_of(200, seed + who)}]
        for turn in range(3):
            messages = [*messages, {"role": "user", "content": text_of(60, seed + 10 * who + turn)}]
            result.append(_chat(messages))
            messages = [*messages, {"role": "assistant", "content": text_of(40, seed + 20 * who + turn)}]
    return result


def rag(seed: int) -> list[Body]:
    """Questions over shared documents: the same pair of documents, then the pair in another order."""
    first, second = (f"Document {n} of {seed}. " + text_of(300, seed + n) for n in (1, 2))
    questions = [text_of(30, seed + 50 + n) for n in range(4)]
    return [_text(first + second + q) for q in questions[:3]] + [_text(second + first + questions[3])]


def summaries(seed: int) -> list[Body]:
    """One long document, asked for in several ways."""
    document = f"Play {seed}. " + text_of(1200, seed)
    return [_text(document + f"\n\nIn {words} words: ", stream=True) for words in (10, 20, 30)]


def code(seed: int) -> list[Body]:
    """A shared file and the line at the cursor."""
    file = f"# file {seed}\n" + "\n".join(
        f"def scene_{n}(player, act={n}):\n    return {text_of(12, seed + n)!r}" for n in range(24)
    )
    return [_text(f"{file}\n\ndef scene_{24 + n}(") for n in range(3)]


def all_kinds(seed: int) -> list[Body]:
    """16 requests, in the order in which a user would send them."""
    return [*chats(seed), *rag(seed + 100), *summaries(seed + 200), *code(seed + 300)]


def _chat(messages: list[dict[str, str]]) -> Body:
    return {"messages": messages, "max_completion_tokens": MAX_TOKENS, "ignore_eos": True}


def _text(prompt: str, *, stream: bool = False) -> Body:
    return {"prompt": prompt, "max_tokens": MAX_TOKENS, "ignore_eos": True, "stream": stream}
