"""Models with the KV shape of real ones and weights that cost nothing: what moves is real, what it says is noise.

`load_format=dummy` fills the weights from a fixed seed, so every instance of a run has the same model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec

from core.errors import ConfigError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class Shape(msgspec.Struct, frozen=True):
    """One model's KV shape. The hidden size is kept small: it decides the prefill's time, not the bytes handed over."""

    name: str
    like: str
    num_layers: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    num_heads: int
    intermediate_size: int

    def token_bytes(self, element_bytes: int = 2) -> int:
        """Bytes of KV per token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * element_bytes


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen2.5-0.5b", "24 layers, 2 KV heads of 64", 24, 2, 64, 512, 8, 512),
        Shape("qwen2.5-1.5b", "28 layers, 2 KV heads of 128", 28, 2, 128, 512, 4, 512),
        Shape("qwen2.5-1.5b-half", "28 layers, 1 KV head of 128", 28, 1, 128, 128, 1, 128),
    )
}


def shape_of(name: str) -> Shape:
    """Raises ConfigError naming the known shapes."""
    if name not in SHAPES:
        raise ConfigError(f"unknown shape {name!r}; known: {', '.join(SHAPES)}")
    return SHAPES[name]


def write_model(shape: Shape, folder: Path, tokenizer: Path) -> Path:
    """Writes a model folder for `vllm serve --load-format dummy`; the tokenizer is copied from another folder."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder / name)
    return folder
