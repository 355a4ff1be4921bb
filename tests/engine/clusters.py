"""The clusters that engine tests share: started once per session through one preloaded process.

BATON_TEST_DEVICE=host:0.01 (or driver) puts every instance's KV cache on a device (tests/engine/test_device.py) and
hands over by cuda_ipc, whatever a test asks for:

    BATON_TEST_DEVICE=driver scripts/test -m "engine and not full and not host_memory" tests/engine
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from cluster.options import ClusterOptions
from tests.fakes.software_gpu import software_library

FLOAT32 = ("--dtype", "float32", "--max-model-len", "4096", "--kv-cache-memory-bytes", "268435456")
CHUNKED = ("--max-num-batched-tokens", "512")
WHOLE = ("--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096")


def options(*arguments: str, **more: Any) -> ClusterOptions:
    """The bundled model in float32, where greedy tokens are the same to the last bit."""
    both = FLOAT32 + arguments
    defaults: dict[str, Any] = {"arguments_prefill": both, "arguments_decode": both, "restart": False}
    if device := os.environ.get("BATON_TEST_DEVICE"):
        more |= {"transport": "cuda_ipc"}
        more |= {"connector": on(device) | {k: v for k, v in more.get("connector", {}).items() if k != "audit"}}
    return ClusterOptions(**(defaults | more))


def on(device: str) -> dict[str, Any]:
    """The connector's options for a device: as in engine/devices.py, `driver` for the one in tests/fakes."""
    if device == "driver":
        library = software_library() or pytest.skip("no g++ here, with which the software driver is compiled")
        device = f"driver:{library}"
    return {"device": device}


def as_fields(chosen: ClusterOptions) -> dict[str, Any]:
    """Options as keyword arguments, for the `make_cluster` fixture."""
    return {name: getattr(chosen, name) for name in chosen.__struct_fields__}
