"""Puts vLLM's KV cache into memory that a transport owns, without touching vLLM.

vLLM allocates the cache of all layers with one `torch.zeros(num_bytes, dtype=int8)` inside the context that the
connector returns from `get_mem_pool_context`. On a CPU that context is ours: it answers this one call with a mapping
that another process can write into. Every other call passes through.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from transport.base import Memory

SMALLEST_CACHE_BYTES = 1 << 20


class CacheMemory(TorchFunctionMode):
    """Replaces the one large zeroed allocation inside this context; `allocate` returns zeroed memory or None."""

    def __init__(self, allocate: Callable[[int], Memory | None]) -> None:
        super().__init__()
        self._allocate = allocate
        self.memory: Memory | None = None
        self.tensor: torch.Tensor | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """torch's hook: called for every torch function inside the context."""
        kwargs = kwargs or {}
        is_cache = func is torch.zeros and len(args) == 1 and isinstance(args[0], int)
        if is_cache and args[0] >= SMALLEST_CACHE_BYTES and kwargs.get("dtype") is torch.int8:
            memory = self._allocate(args[0])
            if memory is not None:
                self.memory = memory
                self.tensor = _tensor_over(memory, args[0])
                return self.tensor
        return func(*args, **kwargs)


def _tensor_over(memory: Memory, num_bytes: int) -> torch.Tensor:
    """A tensor over memory that must outlive it; the ctypes array keeps nothing alive, so the caller does."""
    array = (ctypes.c_int8 * num_bytes).from_address(memory.address)
    return torch.frombuffer(array, dtype=torch.int8)
