"""The one connector that vLLM loads: `kv_connector="BatonConnector"`, `kv_connector_module_path="engine.connector"`.

vLLM makes two of these per instance, one beside its scheduler and one in its worker, and calls them in this order:

    scheduler: get_num_new_matched_tokens → update_state_after_alloc → build_connector_meta
    worker:    bind_connector_metadata → start_load_kv (*) → forward { wait_for_layer_load → save_kv_layer, per layer }
               → wait_for_save → get_transfer_results → get_block_ids_with_load_errors → build_connector_worker_meta
    scheduler: request_finished (for what ended) → update_connector_output

(*) after the forward pass if no request of the step has a load that is part of it.

What each hook does stands in `engine/worker_hooks.py` and `engine/scheduler_hooks.py`.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole, SupportsHMA

from core.layout import HEADS_OUTERMOST
from engine import internals
from engine.devices import device_of, is_on_device, refuse_on_device
from engine.layout import layout_of, refuse_unsupported
from engine.scheduler_hooks import SchedulerHooks
from engine.scheduler_side import Pool, SchedulerSide
from engine.settings import ConnectorSettings
from engine.worker_hooks import WorkerHooks
from engine.worker_side import WorkerSide
from kvcache.arena import Share


class BatonConnector(WorkerHooks, SchedulerHooks, SupportsHMA):
    """Sends and receives; which of both a request needs stands in its ticket."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        """Raises UnsupportedError or ConfigError: this is the start, where a clear refusal is right."""
        super().__init__(vllm_config, role, kv_cache_config)
        internals.check()
        refuse_unsupported(vllm_config, kv_cache_config)
        settings = ConnectorSettings.parse(vllm_config.kv_transfer_config.kv_connector_extra_config)
        refuse_on_device(vllm_config, settings)
        layout = layout_of(vllm_config, kv_cache_config)
        self._num_blocks = kv_cache_config.num_blocks
        num_ranks = vllm_config.parallel_config.tensor_parallel_size
        if role is KVConnectorRole.SCHEDULER:
            algorithm = str(vllm_config.cache_config.prefix_caching_hash_algo)
            in_lockstep = not vllm_config.scheduler_config.async_scheduling
            loads_in_step = in_lockstep and not is_on_device(vllm_config, settings)
            pool = Pool(kv_cache_config.num_blocks, num_ranks, loads_in_step)
            self._scheduler = SchedulerSide(settings, layout, pool, algorithm)
        else:
            share = Share(internals.tensor_parallel_rank(), num_ranks)
            self._worker = WorkerSide(settings, layout, share, device_of(vllm_config, settings))

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """The hooks of a layer are Python, which no CUDA graph would call again: attention stays outside."""
        return True

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """A wish, where the attention back end has the choice: heads outermost in a block, so that a rank of another
        size can be given some of them in one piece. MLA keeps one for all."""
        model = vllm_config.model_config
        return None if model is None or model.use_mla else HEADS_OUTERMOST

    def shutdown(self) -> None:
        """The instance stops."""
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()
