"""What Baton does not do is refused by name before anything starts, and so is what cannot work. Imports no vllm.

A plain instance has no connector, so it may run whatever vLLM runs; only paths and memory are checked for it.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from core.errors import ConfigError, UnsupportedError
from engine.arguments import Arguments
from engine.build import Device
from engine.instance import TENSOR_PARALLEL, InstanceSpec, num_ranks
from transport.device_schemes import refuse_off_device
from transport.schemes import wanted_schemes

INSTANCE_OVERHEAD_BYTES = 600 << 20
_UNQUANTISED = ("auto", "bfloat16", "float16", "float32", "half", "float")
_PARALLEL = {
    "pipeline parallel": ("--pipeline-parallel-size", "-pp"),
    "data parallel": ("--data-parallel-size", "-dp"),
    "prefill context parallel": ("--prefill-context-parallel-size", "-pcp"),
    "decode context parallel": ("--decode-context-parallel-size", "-dcp"),
}
_SPECULATIVE = ("--speculative-config", "-sc", "--spec-method", "--spec-model", "--spec-tokens")
_STATE_MODELS = re.compile(
    r"mamba|jamba|bamba|zamba|rwkv|retnet|nemotron_h|falcon_h1|granitemoehybrid|plamo2|lfm2|qwen3_next|qwen3_5"
    r"|kimi_linear|minimax_text|minimax_m1|recurrent_gemma",
    re.IGNORECASE,
)
_STATE_KEYS = ("ssm_cfg", "mamba_d_state", "mamba_d_conv", "layers_block_type", "hybrid_override_pattern")
_WINDOW_LAYERS = ("sliding_attention", "chunked_attention", "local_attention")
_STATE_LAYERS = ("mamba", "linear_attention", "conv", "recurrent")
_OPTIONAL_WINDOW = re.compile(r"qwen2|qwen3", re.IGNORECASE)
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def check_transport(spec: InstanceSpec, device: Device) -> None:
    """Raises ConfigError for a transport that cannot run here, or that moves no blocks of this device's memory."""
    if spec.plain:
        return
    is_pretended = bool(spec.connector.get("device"))  # for tests: engine/devices.py
    if is_pretended or device is Device.GPU:
        refuse_off_device(spec.transport)
    if not is_pretended:
        wanted_schemes(spec.transport)


def check_arguments(arguments: Sequence[str], device: Device = Device.CPU, *, plain: bool) -> None:
    """Raises UnsupportedError naming the first argument that no test covers."""
    if plain:
        return
    given = Arguments(arguments)
    if device is Device.GPU and given.has("--async-scheduling"):
        raise UnsupportedError("--async-scheduling is not supported on a GPU: leave it out")
    for name, options in _PARALLEL.items():
        size = given.value(*options)
        if size is not None and size != "1":
            raise UnsupportedError(f"{name} size {size} ({options[0]}) is not supported: only 1 is")
    if given.has(*_SPECULATIVE):
        raise UnsupportedError("speculative decoding (--speculative-config) is not supported")
    dtype = given.value("--kv-cache-dtype")
    if dtype is not None and dtype not in _UNQUANTISED:
        raise UnsupportedError(f"a quantised KV cache (--kv-cache-dtype {dtype}) is not supported: leave it at auto")


def check_model(model: str, *, plain: bool) -> None:
    """Raises ConfigError for a path that is no model, UnsupportedError for a kind of model that no test covers."""
    config = _config_of(model)
    if config is None or plain:
        return
    layers = [config, *(value for key in ("text_config", "llm_config") if isinstance(value := config.get(key), dict))]
    for kind, is_kind in _REFUSED.items():
        if any(is_kind(layer) for layer in layers):
            raise UnsupportedError(f"{kind} are not supported: {model} is a {config.get('model_type', 'model')} model")


def check_ranks(model: str, ranks: int) -> None:
    """Raises ConfigError for a tensor parallel size that cannot share the model's heads equally."""
    config = (_config_of(model) if ranks > 1 else None) or {}
    config = config | (config.get("text_config") or {})
    for kind in ("num_attention_heads", "num_key_value_heads"):
        heads = config.get(kind)
        if not isinstance(heads, int) or heads < 1:
            continue
        fewer = kind == "num_key_value_heads" and heads < ranks  # ranks may keep the same KV head
        if max(heads, ranks) % min(heads, ranks) or (heads < ranks and not fewer):
            raise ConfigError(
                f"tensor parallel size {ranks} ({TENSOR_PARALLEL[0]}) cannot share the {kind} {heads} of {model} "
                f"equally: give a size that divides it"
            )


def check_memory(specs: Sequence[InstanceSpec], cache_bytes: int = 0) -> None:
    """Raises ConfigError if KV caches and weights would not fit into this machine's free memory."""
    wanted = sum(_bytes_of(spec) for spec in specs) + cache_bytes
    free = free_memory_bytes()
    if wanted > free:
        kv = " + ".join(f"{num_ranks(spec.arguments) * _kv_bytes(spec) / 2**30:.1f}" for spec in specs)
        raise ConfigError(
            f"too little memory: {len(specs)} instance(s) need about {wanted / 2**30:.1f} GiB (KV cache {kv} GiB, "
            f"{_shared(cache_bytes)}the rest is weights and processes), {free / 2**30:.1f} GiB are free; lower "
            f"--kv-cache-memory-bytes{' or --cache' if cache_bytes else ''}"
        )


def check_pinned(cache_bytes: int) -> None:
    """Raises ConfigError if the cache that engines on GPUs pin would not fit into this machine's free memory."""
    free = free_memory_bytes()
    if cache_bytes > free:
        raise ConfigError(
            f"too little memory: --cache asks for {cache_bytes / 2**30:.1f} GiB of the host, all of which is pinned "
            f"for GPUs, and {free / 2**30:.1f} GiB are free; lower --cache"
        )


def free_memory_bytes() -> int:
    """What can still be taken: of the machine and, in a container, of its limit."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) << 10
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    return min(free, limit - used + int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0)))


def _config_of(model: str) -> dict[str, Any] | None:
    """The model's config.json; None for a hub's name that is not on this machine yet."""
    folder = Path(model)
    if folder.is_dir():
        path = folder / "config.json"
        if not path.is_file():
            raise ConfigError(f"{model} is a folder without a config.json: not a model in Hugging Face's format")
    elif folder.exists() or model.startswith(("/", "./", "../", "~")) or model.count("/") != 1:
        what = "a file, not a folder" if folder.exists() else "no such folder"
        raise ConfigError(
            f"model {model}: {what}; give a folder with a config.json or a hub's name such as Qwen/Qwen3-8B"
        )
    else:
        found = _cached_config(model)
        if found is None:
            return None
        path = Path(found)
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def _cached_config(model: str) -> str | None:
    hub = importlib.import_module("huggingface_hub")
    try:
        found = hub.try_to_load_from_cache(model, "config.json")
    except ValueError as error:
        raise ConfigError(f"model {model!r} is neither a folder nor a hub's name: {error}") from error
    return found if isinstance(found, str) else None


def _has_window(config: dict[str, Any]) -> bool:
    if any(kind in _WINDOW_LAYERS for kind in config.get("layer_types") or ()):
        return True
    if not config.get("sliding_window"):
        return False
    optional = _OPTIONAL_WINDOW.match(str(config.get("model_type", ""))) is not None
    return bool(config.get("use_sliding_window", not optional)) and "layer_types" not in config


def _has_state(config: dict[str, Any]) -> bool:
    names = [str(config.get("model_type", "")), *map(str, config.get("architectures") or ())]
    return (
        any(_STATE_MODELS.search(name) for name in names)
        or any(key in config for key in _STATE_KEYS)
        or any(kind in _STATE_LAYERS for kind in config.get("layer_types") or ())
    )


def _has_encoder(config: dict[str, Any]) -> bool:
    return bool(config.get("is_encoder_decoder")) or config.get("model_type") in ("mllama", "whisper")


def _has_quantised_cache(config: dict[str, Any]) -> bool:
    quantisation = config.get("quantization_config")
    keys = ("kv_cache_scheme", "kv_cache_quant_algo")
    return isinstance(quantisation, dict) and any(quantisation.get(key) for key in keys)


_REFUSED: dict[str, Callable[[dict[str, Any]], bool]] = {
    "sliding-window models": _has_window,
    "Mamba and other models with a recurrent state": _has_state,
    "encoder-decoder models": _has_encoder,
    "models with a quantised KV cache": _has_quantised_cache,
}


def _shared(cache_bytes: int) -> str:
    return f"shared cache {cache_bytes / 2**30:.1f} GiB, " if cache_bytes else ""


def _bytes_of(spec: InstanceSpec) -> int:
    folder = Path(spec.model.path)
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0
    ranks = num_ranks(spec.arguments)
    return ranks * (_kv_bytes(spec) + INSTANCE_OVERHEAD_BYTES) + weights


def _kv_bytes(spec: InstanceSpec) -> int:
    given = Arguments(spec.arguments).value("--kv-cache-memory-bytes")
    if given is not None:
        return parse_bytes(given)
    space = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "")
    return int(space) << 30 if space.isdigit() else spec.model.kv_cache_bytes


def parse_bytes(text: str) -> int:
    """vLLM's notation: 1000, 4k (1000s), 2G (1024s), 1.5g. Raises ConfigError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgtKMGT]?)", text)
    if match is None:
        raise ConfigError(f"--kv-cache-memory-bytes {text!r} is not a number of bytes such as 536870912 or 512M")
    return int(float(match[1]) * _UNITS.get(match[2], 1))
