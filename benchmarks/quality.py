"""What a codec costs in quality: the bundled model reads on after a prefix whose KV went through the codec.

    held-out text ──▶ windows:  │ prefix: 2 blocks ──▶ KV ──▶ codec ──▶ KV' │ 256 tokens: predicted with KV'  │
                                                                             64 tokens: greedy from KV'

Memory model: the KV of all windows' prefixes, and one batch of forward passes. Threading: the caller's thread; torch
uses its own. torch and transformers are imported when a model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.kv_blocks import BLOCK_SIZE, BlockKind, blocks_of, keys_and_values
from core.errors import ConfigError
from kvcache.shape import Dtype

PREFIX_TOKENS = 2 * BLOCK_SIZE
READ_TOKENS = 256
GREEDY_TOKENS = 64
WINDOW_TOKENS = PREFIX_TOKENS + READ_TOKENS
WINDOWS_PER_BATCH = 16

Blocks = list[bytes]


class Quality(msgspec.Struct, frozen=True):
    """Of one codec. bits_per_byte: of what follows the prefix. same_choices: the share of these tokens for which the
    likeliest next one is the same as with exact KV. same_greedy: of GREEDY_TOKENS chosen one after another, the share
    before the first that differs. same_answers: the share of windows in which none does."""

    bits_per_byte: float
    same_choices: float
    same_greedy: float
    same_answers: float


class Reading(msgspec.Struct, frozen=True):
    """What the model made of every window: bits per token (windows, tokens), likeliest tokens (windows, tokens), and
    greedy tokens (windows, GREEDY_TOKENS)."""

    bits: Any
    choices: Any
    greedy: Any


class DemoModel:
    """A model folder as transformers runs it, in float32."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast

        self._torch = torch
        self._make_cache: Callable[[], Any] = DynamicCache
        self._model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)

    def kind(self, dtype: Dtype) -> BlockKind:
        """Of its blocks."""
        config = self._model.config
        return BlockKind(dtype, config.num_hidden_layers, config.num_key_value_heads, config.head_dim)

    def windows(self, text: str, most: int) -> Any:
        """Token ids (windows, WINDOW_TOKENS + 1). Raises ConfigError if the text is too short for one."""
        ids = self._tokenizer(text, verbose=False)["input_ids"]
        starts = range(0, len(ids) - WINDOW_TOKENS, WINDOW_TOKENS)[:most]
        if not starts:
            raise ConfigError(f"the text has {len(ids)} tokens, one window {WINDOW_TOKENS + 1}: give a longer one")
        return self._torch.tensor([ids[at : at + WINDOW_TOKENS + 1] for at in starts])

    def num_bytes(self, windows: Any) -> int:
        """Of the text that is predicted after the prefixes."""
        return sum(len(self._tokenizer.decode(window).encode()) for window in windows[:, PREFIX_TOKENS + 1 :])

    def prefix_blocks(self, windows: Any, kind: BlockKind) -> list[Blocks]:
        """The KV of each window's prefix."""
        result = []
        for batch in windows.split(WINDOWS_PER_BATCH):
            with self._torch.no_grad():
                cache = self._model(batch[:, :PREFIX_TOKENS], use_cache=True).past_key_values
            keys = np.stack([layer.keys.numpy() for layer in cache.layers])
            values = np.stack([layer.values.numpy() for layer in cache.layers])
            result += [blocks_of(keys[:, at], values[:, at], kind) for at in range(len(batch))]
        return result

    def read(self, windows: Any, prefixes: Sequence[Blocks], kind: BlockKind) -> Reading:
        """Reads on, and answers, after prefixes of this KV."""
        bits, choices, greedy = [], [], []
        for at in range(0, len(windows), WINDOWS_PER_BATCH):
            batch, part = windows[at : at + WINDOWS_PER_BATCH], prefixes[at : at + WINDOWS_PER_BATCH]
            tokens, targets = batch[:, PREFIX_TOKENS:-1], batch[:, PREFIX_TOKENS + 1 :]
            with self._torch.no_grad():
                logits = self._model(tokens, past_key_values=self._cache(part, kind)).logits
                losses = -logits.log_softmax(-1).gather(2, targets.unsqueeze(2)).squeeze(2) / math.log(2)
                greedy.append(self._greedy(tokens[:, :1], self._cache(part, kind)))
            bits.append(losses.numpy())
            choices.append(logits.argmax(-1).numpy())
        return Reading(np.concatenate(bits), np.concatenate(choices), np.concatenate(greedy))

    def _greedy(self, token: Any, cache: Any) -> Any:
        chosen = []
        for _ in range(GREEDY_TOKENS):
            token = self._model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            chosen.append(token)
        return self._torch.cat(chosen, dim=1).numpy()

    def _cache(self, prefixes: Sequence[Blocks], kind: BlockKind) -> Any:
        pairs = [keys_and_values(blocks, kind) for blocks in prefixes]
        cache = self._make_cache()
        for layer in range(kind.num_layers):
            keys, values = (np.stack([pair[side][layer] for pair in pairs]) for side in (0, 1))
            cache.update(self._torch.from_numpy(keys), self._torch.from_numpy(values), layer)
        return cache


def quality(exact: Reading, other: Reading, num_bytes: int) -> Quality:
    """num_bytes: of the text that was predicted."""
    differs = exact.greedy != other.greedy
    first = np.where(differs.any(axis=1), differs.argmax(axis=1), differs.shape[1])
    return Quality(
        bits_per_byte=float(other.bits.sum(dtype=np.float64)) / num_bytes,
        same_choices=float((exact.choices == other.choices).mean()),
        same_greedy=float(first.mean() / differs.shape[1]),
        same_answers=float((~differs.any(axis=1)).mean()),
    )
