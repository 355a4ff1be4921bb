"""The one connector that vLLM loads: `kv_connector="BatonConnector"`, `kv_connector_module_path="engine.connector"`.

vLLM makes two of these per instance, one beside its scheduler and one in its worker, and calls them in this order:

    scheduler: get_num_new_matched_tokens → update_state_after_alloc → build_connector_meta
    worker:    bind_connector_metadata → forward { save_kv_layer per layer } → start_load_kv → wait_for_save
               → get_transfer_results → build_connector_worker_meta
    scheduler: request_finished (for what ended) → update_connector_output

This file only translates; it holds no state of a request. No hook waits for a peer and none lets an exception out.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.request import RequestStatus

from engine import internals
from engine.guard import never_raises
from engine.layout import layout_of, refuse_cache_of_ranks, refuse_unsupported
from engine.scheduler_side import Pool, SchedulerSide
from engine.settings import ConnectorSettings
from engine.steps import Handshake, StepOrders, StepResults
from engine.worker_side import WorkerSide

_COMPUTE_LOCALLY: tuple[int | None, bool] = (0, False)
_NO_ORDERS: StepOrders | None = None
_COMPLETED = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


class BatonConnector(KVConnectorBase_V1, SupportsHMA):
    """Sends and receives; which of both a request needs stands in its ticket."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        """Raises UnsupportedError or ConfigError: this is the start, where a clear refusal is right."""
        super().__init__(vllm_config, role, kv_cache_config)
        internals.check()
        refuse_unsupported(vllm_config, kv_cache_config)
        settings = ConnectorSettings.parse(vllm_config.kv_transfer_config.kv_connector_extra_config)
        refuse_cache_of_ranks(settings.cache, vllm_config.parallel_config.tensor_parallel_size)
        layout = layout_of(vllm_config, kv_cache_config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._results: StepResults | None = None
        if role is KVConnectorRole.SCHEDULER:
            algorithm = str(vllm_config.cache_config.prefix_caching_hash_algo)
            pool = Pool(kv_cache_config.num_blocks, vllm_config.parallel_config.tensor_parallel_size)
            self._scheduler = SchedulerSide(settings, layout, pool, algorithm)
        else:
            rank = internals.tensor_parallel_rank()
            self._worker = WorkerSide(settings, layout, rank, vllm_config.device_config.device_type)

    # ---- worker ----

    def get_mem_pool_context(self) -> AbstractContextManager[Any] | None:
        """Lets shm own the KV cache."""
        return self._worker.memory_context() if self._worker is not None else None

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The KV cache exists."""
        if self._worker is not None:
            self._worker.register(kv_caches)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """What the scheduler's side must know of the worker's memory."""
        return self._worker.handshake() if self._worker is not None else None

    @never_raises(None)
    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Before the forward pass: takes the step's orders."""
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None and isinstance(connector_metadata, StepOrders):
            self._worker.begin(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing to start: the sender writes by itself."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: a request is scheduled only after it was received."""

    @never_raises(None)
    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Right after one layer: pushes its finished blocks."""
        if self._worker is not None:
            self._worker.layer_done(layer_name)

    @never_raises(None)
    def wait_for_save(self) -> None:
        """After the forward pass; waits for nothing."""
        if self._worker is not None:
            self._worker.forward_done()

    @never_raises(KVConnectorTransferResults())
    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """What was received or lost; what was sent is decided by the scheduler's side."""
        if self._worker is None:
            return KVConnectorTransferResults()
        self._results = results = self._worker.end()
        arrived = {item.request_id for item in results.arrived}
        lost = {item.request_id for item in results.arrived if item.why_lost}
        return KVConnectorTransferResults(finished_recving=arrived, failed_recving=lost)

    @never_raises(None)
    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """The step's answer for the scheduler's side."""
        results, self._results = self._results or StepResults(), None
        return results

    def shutdown(self) -> None:
        """The instance stops."""
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()

    # ---- scheduler ----

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        """Every worker's memory is known, by pipeline and tensor-parallel rank: join the proxy."""
        handshakes = [metadata[rank] for rank in sorted(metadata)]
        if self._scheduler is not None and all(isinstance(each, Handshake) for each in handshakes):
            self._scheduler.start(handshakes)

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """Gives admission the pool's fill."""
        super().bind_kv_cache_manager(kv_cache_manager)
        if self._scheduler is not None:
            self._scheduler.watch_pool(kv_cache_manager.block_pool.get_num_free_blocks)

    @never_raises(None)
    def on_new_request(self, request: Any) -> None:
        """A request has come: ask the cache before the scheduler looks at it."""
        if self._scheduler is not None:
            self._scheduler.arrived(request)

    @never_raises(_COMPUTE_LOCALLY)
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens come from the cache and from P; (None, False): ask again."""
        if self._scheduler is None:
            return 0, False
        num_tokens = self._scheduler.num_tokens_from_outside(request, num_computed_tokens)
        return num_tokens, bool(num_tokens)

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        """There is one group; several are refused at start."""
        return (0,)

    @never_raises(None)
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Blocks are allocated: load them, and ask P to fill the rest."""
        if self._scheduler is not None:
            self._scheduler.allocated(request, list(blocks.get_block_ids()[0]), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """The step's orders for the worker."""
        return self._build_orders(scheduler_output) or StepOrders()

    @never_raises(_NO_ORDERS)
    def _build_orders(self, scheduler_output: Any) -> StepOrders | None:
        return self._scheduler.orders(scheduler_output) if self._scheduler is not None else None

    @never_raises(None)
    def update_connector_output(self, connector_output: Any) -> None:
        """The worker's answer; names the requests whose blocks may be freed."""
        results = connector_output.kv_connector_worker_meta
        if self._scheduler is not None and isinstance(results, StepResults):
            sent = self._scheduler.results(results)
            connector_output.finished_sending = sent or None

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """A request has ended; True keeps its blocks."""
        return self._finish(request), None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The same for vLLM's hybrid memory allocator."""
        return self._finish(request), None

    @never_raises(False)
    def _finish(self, request: Any) -> bool:
        if self._scheduler is None:
            return False
        return self._scheduler.finished(request, completed=request.status in _COMPLETED)
