"""What vLLM asks of a connector beside its worker, for whom it makes one of its own; the order stands in
`engine/connector.py`.

This file only translates; it holds no state of a request. No hook waits for a peer, none lets an exception out.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
)

from engine.guard import never_raises
from engine.steps import StepOrders, StepResults
from engine.worker_side import WorkerSide


class WorkerHooks(KVConnectorBase_V1):
    """Does nothing beside the scheduler, where there is no worker."""

    _worker: WorkerSide | None = None
    _num_blocks = 0
    _results: StepResults | None = None

    def get_mem_pool_context(self) -> AbstractContextManager[Any] | None:
        """Lets shm own the KV cache."""
        return self._worker.memory_context() if self._worker is not None else None

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The KV cache exists."""
        if self._worker is not None:
            self._worker.register(kv_caches, self._num_blocks)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """What the scheduler's side must know of the worker's memory."""
        return self._worker.handshake() if self._worker is not None else None

    @never_raises(None)
    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Before the forward pass: takes the step's orders."""
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None and isinstance(connector_metadata, StepOrders):
            self._worker.begin(connector_metadata)

    @never_raises(None)
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Before the forward pass of a step that has loads of its own; otherwise after it, with nothing to start."""
        if self._worker is not None:
            self._worker.load_in_step()

    @never_raises(None)
    def wait_for_layer_load(self, layer_name: str) -> None:
        """Right before one layer's attention: waits for what the step itself loads. All else has come before its
        request is scheduled."""
        if self._worker is not None:
            self._worker.wait_for_layer(layer_name)

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
        waited = [item for item in results.arrived if not item.in_step]
        arrived = {item.request_id for item in waited}
        lost = {item.request_id for item in waited if item.why_lost}
        return KVConnectorTransferResults(finished_recving=arrived, failed_recving=lost)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks with which the step has computed and should not have: vLLM throws away what came of it."""
        return self._worker.bad_blocks() if self._worker is not None else set()

    @never_raises(None)
    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """The step's answer for the scheduler's side."""
        results, self._results = self._results or StepResults(), None
        return results
