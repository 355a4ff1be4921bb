"""Everything that Baton reads of vLLM beyond its public connector interface, and what differs between its versions.

Built on vLLM 0.32. Each function says what it relies on; `check` is called once at start and names what is missing,
so that another vLLM fails with one clear line and not in the middle of a request.
"""

from __future__ import annotations

import hashlib
import queue
import sys
import threading
from array import array
from typing import Any

import torch

from core.errors import UnsupportedError
from core.handoff import Handoff
from core.prompt import Prompt


def check() -> None:
    """Raises UnsupportedError if this vLLM lacks something that the connector relies on."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import base
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    wanted = [
        (base, "KVConnectorTransferResults"),
        (base.KVConnectorBase_V1, "get_transfer_results"),
        (base.KVConnectorBase_V1, "get_mem_pool_context"),
        (base.KVConnectorBase_V1, "build_connector_worker_meta"),
        (base.KVConnectorBase_V1, "bind_kv_cache_manager"),
        (base.KVConnectorBase_V1, "get_block_ids_with_load_errors"),
        (KVCacheManager, "evict_blocks"),
        (Request, "update_block_hashes"),
    ]
    missing = [f"{owner.__name__}.{name}" for owner, name in wanted if not hasattr(owner, name)]
    if "kv_connector_block_state" not in SchedulerOutput.__dataclass_fields__:
        missing.append("SchedulerOutput.kv_connector_block_state")
    if missing:
        raise UnsupportedError(f"this vLLM lacks {', '.join(missing)}; Baton supports vLLM 0.32")


def prompt_of(request: Any, handoff: Handoff) -> Prompt:
    """A `vllm.v1.request.Request` as the hand-off logic sees it.

    Relies on: request_id, num_prompt_tokens, prompt_token_ids, block_hashes (chained, process-independent for the
    default sha256), lora_request.lora_name.
    """
    digest = hashlib.sha256(array("q", request.prompt_token_ids or ()).tobytes())
    num_full_blocks = len(request.block_hashes)
    if num_full_blocks:
        digest.update(bytes(request.block_hashes[-1]))
    if request.cache_salt:
        digest.update(b"salt" + request.cache_salt.encode())
    if request.lora_request is not None:
        digest.update(b"lora" + request.lora_request.lora_name.encode())
    return Prompt(request.request_id, handoff, request.num_prompt_tokens, digest.digest()[:16])


def attention_isa(dtype: torch.dtype, block_size: int, head_size: int) -> str:
    """How the CPU's attention packs a block's interior on this processor; empty on a GPU."""
    from vllm.platforms import current_platform

    if current_platform.device_type != "cpu":
        return ""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return str(_get_attn_isa(dtype, block_size, head_size))


def tensor_parallel_rank() -> int:
    """Of this worker. Relies on the rank being known before the connector is made."""
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


def num_kv_heads(model_config: Any) -> int:
    """Of the whole model, as its blocks hold them: MLA keeps one for all."""
    return 1 if model_config.use_mla else int(model_config.get_total_num_kv_heads())


class IdleSleep:
    """Lets an engine that only waits for a peer sleep until a request or a message comes.

    vLLM's engine core steps an empty batch every millisecond while a request waits for remote KV, which costs 20 to
    100 % of a core. This finds the core's input queue (`EngineCoreProc.input_queue`, a queue.Queue) on the stack of
    the connector's constructor and waits on the queue's own condition, so that requests and aborts end the sleep at
    once; `wake` does so from any thread. Where there is no such queue it waits on an event of its own, briefly.
    """

    def __init__(self) -> None:
        self._queue = _find_input_queue()
        self._event = threading.Event()
        self._woken = False

    def wake(self) -> None:
        """Ends the sleep, or makes the next one return at once."""
        self._woken = True
        self._event.set()
        if self._queue is not None:
            with self._queue.not_empty:
                self._queue.not_empty.notify()

    def sleep(self, timeout_s: float) -> None:
        """Returns after `timeout_s` at the latest."""
        if self._queue is None:
            self._event.wait(min(timeout_s, 0.002))
        else:
            with self._queue.not_empty:
                if not self._queue.queue and not self._woken:
                    self._queue.not_empty.wait(timeout_s)
        self._woken = False
        self._event.clear()


def _find_input_queue() -> queue.Queue[Any] | None:
    frame = sys._getframe()
    while frame is not None:
        found = getattr(frame.f_locals.get("self"), "input_queue", None)
        if isinstance(found, queue.Queue):
            return found
        frame = frame.f_back  # type: ignore[assignment]
    return None
