"""Prompts of exact lengths, cut from Shakespeare (passage.txt: public domain); no two start alike unless asked to."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]
BLOCK = 128
SHORT = (1, BLOCK - 1, BLOCK, BLOCK + 1)
SEVERAL = (2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 5 * BLOCK - 1, 5 * BLOCK, 5 * BLOCK + 1)
LONG = (1000, 3000)
LENGTHS = SHORT + SEVERAL + LONG


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(ROOT / "cluster" / "demo_model" / "tokenizer.json"))


@cache
def _stream() -> list[int]:
    """Token ids to cut from: the model card and the licence if the corpus is not at hand would do as well."""
    text = (ROOT / "tests" / "engine" / "passage.txt").read_text()
    ids = _tokenizer().encode(text, add_special_tokens=False).ids
    return [int(i) for i in ids]


def token_prompt(num_tokens: int, seed: int) -> list[int]:
    """Exactly so many token ids; a seed of its own starts with a token pair of its own."""
    stream = _stream()
    start = (seed * 997) % max(len(stream) - num_tokens, 1)
    ids = stream[start : start + num_tokens]
    assert len(ids) == num_tokens, "the passage is too short"
    unique = [10 + seed % 1000, 10 + (seed // 1000 + seed * 7) % 1000]
    return (unique + ids[2:])[:num_tokens]


def text_of(num_tokens: int, seed: int) -> str:
    """About so many tokens of the passage as text."""
    return str(_tokenizer().decode(token_prompt(num_tokens, seed)[2:]))


def chat_messages(num_tokens: int, seed: int) -> list[dict[str, Any]]:
    """A user message of about so many tokens after a system text."""
    text = _tokenizer().decode(token_prompt(max(num_tokens - 20, 1), seed))
    return [
        {"role": "system", "content": f"You are player {seed}. Answer in verse."},
        {"role": "user", "content": text or "Speak."},
    ]


def text_prompt(num_tokens: int, seed: int) -> str:
    """A text of about so many tokens."""
    return f"{seed}. {_tokenizer().decode(token_prompt(num_tokens, seed)[2:])}"
