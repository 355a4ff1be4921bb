"""One vLLM server as Baton starts it: the arguments of `vllm serve` and the environment. Imports no vllm.

What a user passes through always wins over the defaults added here; what Baton must set itself is refused.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from core.errors import ConfigError
from core.handoff import Role
from engine.arguments import Arguments
from engine.build import Device

DEFAULT_KV_CACHE_BYTES = 512 << 20
DRAIN_TIMEOUT_S = 2
"""With vLLM's default of 0 the engine core is killed at once and cannot tell the proxy that it leaves."""
ENV_DIE_WITH_PARENT = "BATON_DIE_WITH_PARENT"
ENV_ENGINE_CORES = "BATON_ENGINE_CORES"
ENV_VLLM_CORES = "VLLM_CPU_OMP_THREADS_BIND"
ENV_VISIBLE = "CUDA_VISIBLE_DEVICES"
ENV_NO_COMPILE = "TORCH_COMPILE_DISABLE"
TENSOR_PARALLEL = ("--tensor-parallel-size", "-tp")

_OURS = ("--host", "--port", "--model", "--kv-transfer-config")
_EAGER = ("--enforce-eager", "--no-enforce-eager", "--compilation-config", "-cc", "-O", "--optimization-level")
_SOURCE = Path(__file__).resolve().parent.parent


class ServedModel(msgspec.Struct, frozen=True):
    """What is served: a folder or a hub's name, the name clients use ("" for vLLM's default), a KV cache default."""

    path: str
    name: str = ""
    kv_cache_bytes: int = DEFAULT_KV_CACHE_BYTES


class InstanceSpec(msgspec.Struct, frozen=True):
    """What one instance is to be.

    join: the proxy's address. plain: a vLLM without a connector, which can neither send nor receive.
    cores: the cores its engine computes on; empty: wherever the system puts it.
    gpus: those that it sees, its own first; empty: those that CUDA shows. gpu_memory: the share of a GPU's memory that
    it takes; 0: vLLM's default.
    arguments: for `vllm serve`, as the user gave them.
    connector: further options of the connector (engine/settings.py).
    environment: further environment variables.
    """

    name: str
    role: Role
    model: ServedModel
    host: str
    port: int
    join: str
    plain: bool = False
    transport: str = "auto"
    cores: tuple[int, ...] = ()
    gpus: tuple[str, ...] = ()
    gpu_memory: float = 0.0
    arguments: tuple[str, ...] = ()
    connector: dict[str, Any] = {}
    environment: dict[str, str] = {}

    @property
    def keys(self) -> str:
        """Path of the cluster's key file; empty where there is none."""
        return str(self.connector.get("keys", ""))

    @property
    def url(self) -> str:
        """Where its OpenAI server answers."""
        return url_of(self.host, self.port)

    def serve_arguments(self, device: Device) -> list[str]:
        """What follows `vllm serve`. Raises ConfigError for an argument that Baton sets itself."""
        given = Arguments(self.arguments)
        for option in _OURS:
            if given.has(option) and not (self.plain and option == "--kv-transfer-config"):
                raise ConfigError(f"{option} is set by Baton and cannot be passed through to vLLM")
        result = [self.model.path, "--host", self.host, "--port", str(self.port)]
        if self.model.name and not given.has("--served-model-name"):
            result += ["--served-model-name", self.model.name]
        if not given.has("--disable-uvicorn-access-log", "--no-disable-uvicorn-access-log"):
            result += ["--disable-uvicorn-access-log"]
        if not given.has("--shutdown-timeout"):
            result += ["--shutdown-timeout", str(DRAIN_TIMEOUT_S)]
        if device is Device.CPU:
            if not given.has(*_EAGER):
                result += ["--enforce-eager"]
            if not given.has("--kv-cache-memory-bytes", "--num-gpu-blocks-override"):
                result += ["--kv-cache-memory-bytes", str(self.model.kv_cache_bytes)]
        else:
            result += self._arguments_on_gpu(given)
        if not self.plain:
            result += ["--kv-transfer-config", self.kv_transfer_config()]
        return [*result, *self.arguments]

    def _arguments_on_gpu(self, given: Arguments) -> list[str]:
        result = []
        if self.gpu_memory and not given.has("--gpu-memory-utilization", "--kv-cache-memory-bytes"):
            result += ["--gpu-memory-utilization", str(self.gpu_memory)]
        if not self.plain and not given.has("--no-async-scheduling"):
            result += ["--no-async-scheduling"]  # engine/devices.py says why
        return result

    def kv_transfer_config(self) -> str:
        """The JSON that makes vLLM load Baton's connector; the same line that one writes by hand."""
        options = {"name": self.name, "role": self.role.value, "url": self.url, "join": self.join}
        options |= {"host": self.host, "transport": self.transport}
        return msgspec.json.encode(
            {
                "kv_connector": "BatonConnector",
                "kv_connector_module_path": "engine.connector",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": options | self.connector,
            }
        ).decode()

    def variables(self, folder: Path, cache: Path, device: Device) -> dict[str, str]:
        """What its environment has beyond the launcher's.

        folder: short, its own, removed after it: vLLM leaves its sockets there. cache: kept between runs.
        """
        result = common_variables(folder, cache, offline=Path(self.model.path).is_dir())
        result[ENV_DIE_WITH_PARENT] = "1"
        if device is Device.CPU:
            result |= self._variables_of_cpu()
        elif self.gpus:
            result[ENV_VISIBLE] = ",".join(self.gpus)
        return result | self.environment

    def _variables_of_cpu(self) -> dict[str, str]:
        """Engine core and worker in one process (the worker of a second one would spin), on cores of their own."""
        result = {"VLLM_ENABLE_V1_MULTIPROCESSING": os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "0")}
        if num_ranks(self.arguments) > 1 and not self._compiles():
            result[ENV_NO_COMPILE] = "1"
        if self.cores:
            ranks = [",".join(map(str, share)) for share in self._cores_of_ranks()]
            result |= {ENV_VLLM_CORES: "|".join(ranks), ENV_ENGINE_CORES: ",".join(map(str, self.cores))}
            result["OMP_NUM_THREADS"] = str(max(len(self.cores) // len(ranks), 1))
        return result

    def _compiles(self) -> bool:
        """Whether the user asked for compiled models; without, vLLM still compiles one mask of tensor parallelism,
        with a C++ compiler, for half a minute at the first request."""
        given = Arguments(self.arguments)
        return given.has(*_EAGER) and not given.has("--enforce-eager")

    def _cores_of_ranks(self) -> list[tuple[int, ...]]:
        """Equal shares of neighbouring cores; with fewer cores than ranks, one each, wrapping around."""
        count = num_ranks(self.arguments)
        size = max(len(self.cores) // count, 1)
        firsts = [rank * size % len(self.cores) for rank in range(count)]
        return [self.cores[first : first + size] for first in firsts]


def num_ranks(arguments: Sequence[str]) -> int:
    """How many tensor-parallel workers an instance has. Raises ConfigError if that is no number."""
    given = Arguments(arguments).value(*TENSOR_PARALLEL)
    if given is None:
        return 1
    if not given.isdigit() or int(given) < 1:
        raise ConfigError(f"{TENSOR_PARALLEL[0]} {given!r} is not a number of at least 1")
    return int(given)


def url_of(host: str, port: int) -> str:
    """The base address of a server."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def common_variables(folder: Path, cache: Path, *, offline: bool) -> dict[str, str]:
    """What every process that imports vLLM gets. offline: nothing is asked of a model hub."""
    result = {
        "TMPDIR": str(folder),
        "VLLM_RPC_BASE_PATH": str(folder),
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": source_path(),
    }
    if "VLLM_CACHE_ROOT" not in os.environ:
        result["VLLM_CACHE_ROOT"] = str(cache)
    if offline:
        result["HF_HUB_OFFLINE"] = "1"
    return result


def source_path() -> str:
    """PYTHONPATH with Baton's own folders in front, whatever folder a child runs in."""
    return os.pathsep.join(filter(None, [str(_SOURCE), os.environ.get("PYTHONPATH", "")]))


def cache_folder() -> Path:
    """vLLM's cache, kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baton"
