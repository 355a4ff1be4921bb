"""What travels between the scheduler's and the worker's half of the connector with each engine step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from decode.land import LandCommands, LandResults
from prefill.push import PushCommands, PushResults


@dataclass
class Handshake(KVConnectorHandshakeMetadata):
    """Worker to scheduler, once: the transports on offer with their descriptions, best first."""

    schemes: list[tuple[str, bytes]] = field(default_factory=list)


@dataclass
class StepOrders(KVConnectorMetadata):
    """Scheduler to worker, every step."""

    push: PushCommands = field(default_factory=PushCommands)
    land: LandCommands = field(default_factory=LandCommands)


@dataclass
class StepResults(KVConnectorWorkerMetadata):
    """Worker to scheduler, every step. num_watched: hand-offs whose end comes without a message."""

    push: PushResults = field(default_factory=PushResults)
    land: LandResults = field(default_factory=LandResults)
    num_watched: int = 0

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Called with several tensor-parallel ranks, which are refused at start."""
        return self
