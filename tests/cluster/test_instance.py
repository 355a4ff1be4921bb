"""What an instance is started with: our defaults, unless the user said otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cluster.bundled import BUNDLED_FOLDER, BUNDLED_NAME, served_model
from core.errors import ConfigError
from core.handoff import Role
from engine.arguments import Arguments
from engine.build import Device
from engine.instance import InstanceSpec

SPEC = InstanceSpec("prefill-0", Role.PREFILL, served_model(None), "127.0.0.1", 8101, "http://127.0.0.1:8000")


def test_a_cpu_instance_gets_defaults_that_work() -> None:
    arguments = SPEC.serve_arguments(Device.CPU)
    assert arguments[0] == str(BUNDLED_FOLDER)
    given = Arguments(arguments)
    assert given.value("--served-model-name") == BUNDLED_NAME
    assert given.value("--kv-cache-memory-bytes") == str(256 << 20)
    assert given.has("--enforce-eager", "--disable-uvicorn-access-log")


def test_a_gpu_instance_keeps_vllms_own_defaults() -> None:
    given = Arguments(SPEC.serve_arguments(Device.GPU))
    assert not given.has("--enforce-eager")
    assert not given.has("--kv-cache-memory-bytes", "--gpu-memory-utilization")


def test_a_gpu_instance_with_a_connector_schedules_one_step_after_the_other() -> None:
    """What asynchronous scheduling gives away a GPU may still write to."""
    assert "--no-async-scheduling" in SPEC.serve_arguments(Device.GPU)
    assert "--no-async-scheduling" not in SPEC.serve_arguments(Device.CPU)
    assert "--no-async-scheduling" not in _change(plain=True).serve_arguments(Device.GPU)
    given = _change(arguments=("--no-async-scheduling",)).serve_arguments(Device.GPU)
    assert given.count("--no-async-scheduling") == 1


def test_instances_that_meet_on_a_gpu_share_its_memory(tmp_path: Path) -> None:
    spec = _change(gpus=("1", "0"), gpu_memory=0.45)
    assert Arguments(spec.serve_arguments(Device.GPU)).value("--gpu-memory-utilization") == "0.45"
    assert spec.variables(tmp_path, tmp_path, Device.GPU)["CUDA_VISIBLE_DEVICES"] == "1,0"
    chosen = _change(gpu_memory=0.45, arguments=("--gpu-memory-utilization", "0.3"))
    assert chosen.serve_arguments(Device.GPU).count("--gpu-memory-utilization") == 1
    assert "CUDA_VISIBLE_DEVICES" not in spec.variables(tmp_path, tmp_path, Device.CPU)


def test_the_connector_hears_who_it_is() -> None:
    spec = _change(connector={"full_digest": True}, transport="zmq")
    config = json.loads(Arguments(spec.serve_arguments(Device.CPU)).value("--kv-transfer-config") or "")
    assert config["kv_connector"] == "BatonConnector"
    assert config["kv_connector_module_path"] == "engine.connector"
    assert config["kv_role"] == "kv_both"
    assert config["kv_load_failure_policy"] == "recompute"
    assert config["kv_connector_extra_config"] == {
        "name": "prefill-0",
        "role": "prefill",
        "url": "http://127.0.0.1:8101",
        "join": "http://127.0.0.1:8000",
        "host": "127.0.0.1",
        "transport": "zmq",
        "full_digest": True,
    }


def test_a_plain_instance_has_no_connector() -> None:
    assert "--kv-transfer-config" not in _change(plain=True).serve_arguments(Device.CPU)


@pytest.mark.parametrize(
    ("given", "left_out"),
    [
        (("--no-enforce-eager",), "--enforce-eager"),
        (("--kv_cache_memory_bytes=1G",), "--kv-cache-memory-bytes"),
        (("--served-model-name", "mine"), "baton-demo"),
    ],
)
def test_what_the_user_gave_replaces_our_default(given: tuple[str, ...], left_out: str) -> None:
    arguments = _change(arguments=given).serve_arguments(Device.CPU)
    assert left_out not in arguments
    assert tuple(arguments[-len(given) :]) == given


@pytest.mark.parametrize("option", ["--port", "--host", "--model", "--kv-transfer-config", "--kv_transfer_config"])
def test_what_baton_sets_itself_cannot_be_passed_through(option: str) -> None:
    with pytest.raises(ConfigError, match="set by Baton"):
        _change(arguments=(option, "x")).serve_arguments(Device.CPU)


def test_the_environment_keeps_sockets_short_and_cores_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_CACHE_ROOT", "VLLM_ENABLE_V1_MULTIPROCESSING"):
        monkeypatch.delenv(name, raising=False)
    variables = _change(cores=(2, 3), environment={"MINE": "1"}).variables(tmp_path, tmp_path / "cache", Device.CPU)
    assert variables["TMPDIR"] == variables["VLLM_RPC_BASE_PATH"] == str(tmp_path)
    assert variables["VLLM_CPU_OMP_THREADS_BIND"] == "2,3"
    assert variables["OMP_NUM_THREADS"] == "2"
    assert variables["HF_HUB_OFFLINE"] == variables["VLLM_NO_USAGE_STATS"] == variables["MINE"] == "1"
    assert variables["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_tensor_parallel_ranks_share_the_instances_cores(tmp_path: Path) -> None:
    two = ("--tensor-parallel-size", "2")
    variables = _change(cores=(2, 3, 4, 5), arguments=two).variables(tmp_path, tmp_path, Device.CPU)
    assert variables["VLLM_CPU_OMP_THREADS_BIND"] == "2,3|4,5"
    assert variables["BATON_ENGINE_CORES"] == "2,3,4,5"
    assert variables["OMP_NUM_THREADS"] == "2"
    alone = _change(cores=(7,), arguments=two).variables(tmp_path, tmp_path, Device.CPU)
    assert alone["VLLM_CPU_OMP_THREADS_BIND"] == "7|7"


def test_an_eager_model_of_several_ranks_waits_for_no_compiler(tmp_path: Path) -> None:
    for arguments, compiles in [
        (("-tp", "2"), False),
        (("-tp", "2", "--enforce-eager"), False),
        (("-tp", "2", "--no-enforce-eager"), True),
        (("-tp", "1"), True),
    ]:
        variables = _change(arguments=arguments).variables(tmp_path, tmp_path, Device.CPU)
        assert ("TORCH_COMPILE_DISABLE" not in variables) == compiles, arguments


def test_a_hub_model_may_ask_the_hub(tmp_path: Path) -> None:
    variables = _change(model=served_model("Qwen/Qwen3-8B")).variables(tmp_path, tmp_path, Device.GPU)
    assert "HF_HUB_OFFLINE" not in variables
    assert "VLLM_CPU_OMP_THREADS_BIND" not in variables


def _change(**fields: Any) -> InstanceSpec:
    return msgspec.structs.replace(SPEC, **fields)
