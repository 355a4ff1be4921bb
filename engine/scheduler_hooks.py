"""What vLLM asks of a connector beside its scheduler, for whom it makes one of its own; the order stands in
`engine/connector.py`.

This file only translates; it holds no state of a request. No hook waits for a peer, and none of a request's lets an
exception out.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata
from vllm.v1.request import RequestStatus

from engine.guard import never_raises
from engine.scheduler_side import SchedulerSide
from engine.steps import Handshake, StepOrders, StepResults

_COMPUTE_LOCALLY: tuple[int | None, bool] = (0, False)
_NO_ORDERS: StepOrders | None = None
_COMPLETED = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


class SchedulerHooks(KVConnectorBase_V1):
    """Does nothing beside the worker, where there is no scheduler."""

    _scheduler: SchedulerSide | None = None

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        """Every worker's memory is known, by pipeline and tensor-parallel rank: join the proxy."""
        handshakes = [metadata[rank] for rank in sorted(metadata)]
        if self._scheduler is not None and all(isinstance(each, Handshake) for each in handshakes):
            self._scheduler.start(handshakes)

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """Gives admission the pool's fill."""
        super().bind_kv_cache_manager(kv_cache_manager)
        if self._scheduler is not None:
            self._scheduler.watch_pool(kv_cache_manager.block_pool.get_num_free_blocks, kv_cache_manager.evict_blocks)

    @never_raises(None)
    def on_new_request(self, request: Any) -> None:
        """A request has come: ask the cache before the scheduler looks at it."""
        if self._scheduler is not None:
            self._scheduler.arrived(request)

    @never_raises(_COMPUTE_LOCALLY)
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens come from the cache and from P, and whether before the request is scheduled or in the same
        step; (None, False): ask again."""
        if self._scheduler is None:
            return 0, False
        num_tokens = self._scheduler.num_tokens_from_outside(request, num_computed_tokens)
        return num_tokens, bool(num_tokens) and not self._scheduler.loads_in_step(request)

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
        orders = self._build_orders(scheduler_output)
        if orders is None and self._scheduler is not None:
            return StepOrders(unloaded=self._scheduler.blocks_on_trial())
        return orders or StepOrders()

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
