"""The KV cache of real models, by name: how many bytes a token costs, and in which pieces they lie.

    bytes per token and layer
        multi-head, grouped-query attention    2 (K and V) * KV heads * head size * bytes per number
        multi-head latent attention            (KV LoRA rank + rotary head size) * bytes per number        (DeepSeek)
    one block of one layer, a piece            block size * bytes per token and layer
    one block                                  layers * that

The numbers stand in each model's config.json on the Hugging Face hub (num_hidden_layers, num_key_value_heads,
head_dim or hidden_size / num_attention_heads, kv_lora_rank, qk_rope_head_dim); the formulas follow from what vLLM's
paged caches hold: keys and values of every KV head, and for latent attention one compressed vector and one rotary key
for all heads. KV is bfloat16 here, and the tensor-parallel size is 1.

Memory and threading: pure.
"""

from __future__ import annotations

import msgspec

from core.errors import ConfigError

ELEMENT_BYTES = 2


class KVModel(msgspec.Struct, frozen=True):
    """One model. `row_numbers`: numbers per token and layer, keys and values together."""

    name: str
    num_layers: int
    row_numbers: int
    like: str

    @property
    def layer_token_bytes(self) -> int:
        """Of one token in one layer."""
        return self.row_numbers * ELEMENT_BYTES

    @property
    def token_bytes(self) -> int:
        """Of one token in all layers."""
        return self.layer_token_bytes * self.num_layers

    def piece_bytes(self, block_size: int) -> int:
        """Of one block in one layer."""
        return self.layer_token_bytes * block_size

    def block_bytes(self, block_size: int) -> int:
        """Of one block in all layers."""
        return self.token_bytes * block_size


def _grouped(name: str, num_layers: int, num_kv_heads: int, head_size: int) -> KVModel:
    like = f"{num_layers} layers, {num_kv_heads} KV heads of {head_size}"
    return KVModel(name, num_layers, 2 * num_kv_heads * head_size, like)


def _latent(name: str, num_layers: int, rank: int, rotary: int) -> KVModel:
    return KVModel(name, num_layers, rank + rotary, f"{num_layers} layers, latent KV of {rank} + {rotary}")


KV_MODELS = {
    model.name: model
    for model in (
        _grouped("qwen2.5-0.5b", 24, 2, 64),
        _grouped("qwen2.5-7b", 28, 4, 128),
        _grouped("qwen3-8b", 36, 8, 128),
        _grouped("llama-3-8b", 32, 8, 128),
        _grouped("qwen3-32b", 64, 8, 128),
        _grouped("llama-3-70b", 80, 8, 128),
        _latent("deepseek-v3", 61, 512, 64),
    )
}


def kv_model(name: str) -> KVModel:
    """Raises ConfigError naming the known ones."""
    if name not in KV_MODELS:
        raise ConfigError(f"--models: unknown model {name!r}; known: {', '.join(KV_MODELS)}")
    return KV_MODELS[name]
