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

from engine import internals
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
        layout = layout_of(vllm_config, kv_cache_config)
        num_ranks = vllm_config.parallel_config.tensor_parallel_size
        if role is KVConnectorRole.SCHEDULER:
            algorithm = str(vllm_config.cache_config.prefix_caching_hash_algo)
            in_lockstep = not vllm_config.scheduler_config.async_scheduling
            pool = Pool(kv_cache_config.num_blocks, num_ranks, in_lockstep)
            self._scheduler = SchedulerSide(settings, layout, pool, algorithm)
        else:
            share = Share(internals.tensor_parallel_rank(), num_ranks)
            self._worker = WorkerSide(settings, layout, share, vllm_config.device_config.device_type)

    def shutdown(self) -> None:
        """The instance stops."""
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()
