"""Reads a `KVLayout` and the memory regions off a running vLLM, and refuses what no test covers."""

from __future__ import annotations

from typing import Any

import torch

from core.errors import UnsupportedError
from core.layout import KVLayout
from engine.identity import model_identity
from engine.internals import attention_isa, num_kv_heads
from transport.base import Region
from transport.runs import heads_of


def refuse_unsupported(config: Any, kv_cache_config: Any) -> None:
    """Raises UnsupportedError by name for a vLLM configuration that Baton cannot hand off exactly."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    parallel = config.parallel_config
    sizes = {
        "pipeline": parallel.pipeline_parallel_size,
        "data": parallel.data_parallel_size,
    }
    for name, size in sizes.items():
        if size > 1:
            raise UnsupportedError(
                f"{name} parallel size {size}: Baton hands off between instances of {name} parallel size 1 only"
            )
    if config.speculative_config is not None:
        raise UnsupportedError("speculative decoding is not supported with hand-off; leave --speculative-config out")
    if str(config.cache_config.cache_dtype) not in ("auto", "float16", "bfloat16", "float32"):
        raise UnsupportedError(f"quantised KV cache {config.cache_config.cache_dtype!r} is not supported with hand-off")
    if config.cache_config.cache_dtype == "auto" and config.model_config.is_hybrid:
        raise UnsupportedError("hybrid (Mamba) models are not supported with hand-off")
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1 or not isinstance(groups[0].kv_cache_spec, FullAttentionSpec):
        raise UnsupportedError("only models whose layers all use full attention are supported with hand-off")
    if getattr(groups[0].kv_cache_spec, "sliding_window", None):
        raise UnsupportedError("sliding-window models are not supported with hand-off")
    if config.kv_transfer_config.kv_load_failure_policy != "recompute":
        raise UnsupportedError('kv_load_failure_policy must be "recompute" in --kv-transfer-config')


def layout_of(config: Any, kv_cache_config: Any) -> KVLayout:
    """The layout of a supported vLLM configuration."""
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    model = config.model_config
    num_heads = spec.num_kv_heads
    if config.parallel_config.tensor_parallel_size > 1:
        num_heads = _num_heads_of_all(model, spec.num_kv_heads, config.parallel_config.tensor_parallel_size)
    extra = {
        "load_format": str(config.load_config.load_format),
        "seed": str(model.seed) if str(config.load_config.load_format) == "dummy" else "",
        "quantization": str(model.quantization),
        "max_position": str(getattr(model.hf_config, "max_position_embeddings", "")),
    }
    return KVLayout(
        model=model_identity(model.hf_config.to_dict(), model.model, model.revision, extra),
        dtype=str(spec.dtype).removeprefix("torch."),
        num_layers=len(kv_cache_config.kv_cache_groups[0].layer_names),
        num_kv_heads=num_heads,
        head_size=spec.head_size,
        block_size=spec.block_size,
        block_bytes=spec.page_size_bytes // spec.num_kv_heads * num_heads,
        order=str(kv_cache_config.kv_cache_layout),
        isa=attention_isa(spec.dtype, spec.block_size, spec.head_size),
    )


def _num_heads_of_all(model: Any, of_rank: int, num_ranks: int) -> int:
    """Over all ranks, each counted once. Raises UnsupportedError if a rank holds others than transport/runs.py says."""
    total = num_kv_heads(model)
    if max(total, num_ranks) % min(total, num_ranks) or of_rank != len(heads_of(total, num_ranks, 0)):
        raise UnsupportedError(
            f"tensor parallel size {num_ranks}: each rank keeps {of_rank} of {total} KV heads, which is not supported"
        )
    return total


def regions_of(kv_caches: dict[str, torch.Tensor], num_blocks: int) -> list[Region]:
    """One region per layer, in layer order. num_blocks: that the scheduler counts. Raises UnsupportedError if a block
    of a layer is not one piece of memory."""
    regions = []
    for index, (name, cache) in enumerate(kv_caches.items()):
        if cache.shape[0] != num_blocks:
            raise UnsupportedError(
                f"the KV cache of layer {name} is an array of {cache.shape[0]}, not of the scheduler's {num_blocks} "
                "blocks: give --block-size what the attention back end computes with, or choose another back end"
            )
        block = cache[0]
        block_bytes = block.numel() * block.element_size()
        if not is_one_piece(block):
            raise UnsupportedError(f"the KV cache of layer {name} is not laid out block by block")
        stride = cache.stride(0) * cache.element_size()
        device = cache.device.index if cache.device.type == "cuda" else None
        regions.append(Region(index, cache.data_ptr(), block_bytes, stride, num_blocks, device))
    return regions


def is_one_piece(block: torch.Tensor) -> bool:
    """Whether a tensor fills the memory between its first and last element, in whatever order of its dimensions: back
    ends of GPUs show blocks as heads by tokens, and some keep them as tokens by heads."""
    expected = 1
    for stride, size in sorted(
        (stride, size) for stride, size in zip(block.stride(), block.shape, strict=True) if size > 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True
