"""The clusters that engine tests share: started once per session through one preloaded process."""

from __future__ import annotations

from typing import Any

from cluster.options import ClusterOptions

FLOAT32 = ("--dtype", "float32", "--max-model-len", "4096", "--kv-cache-memory-bytes", "268435456")
CHUNKED = ("--max-num-batched-tokens", "512")
WHOLE = ("--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096")


def options(*arguments: str, **more: Any) -> ClusterOptions:
    """The bundled model in float32, where greedy tokens are the same to the last bit."""
    both = FLOAT32 + arguments
    defaults: dict[str, Any] = {"arguments_prefill": both, "arguments_decode": both, "restart": False}
    return ClusterOptions(**(defaults | more))


def as_fields(chosen: ClusterOptions) -> dict[str, Any]:
    """Options as keyword arguments, for the `make_cluster` fixture."""
    return {name: getattr(chosen, name) for name in chosen.__struct_fields__}
