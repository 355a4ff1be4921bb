"""What travels between the scheduler's and the worker's half of the connector with each engine step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from decode.land import LandCommands, LandResults
from engine.arrivals import Arrived
from kvcache.orders import CacheOrders, CacheResults
from prefill.push import PushCommands, PushResults


@dataclass
class Handshake(KVConnectorHandshakeMetadata):
    """Worker to scheduler, once: the transports on offer with their descriptions, best first, and the worker's door."""

    schemes: list[tuple[str, bytes]] = field(default_factory=list)
    door: str = ""


@dataclass
class StepOrders(KVConnectorMetadata):
    """Scheduler to worker, every step. bell: to be rung (transport/bell.py) when a load from the cache has ended.
    unloaded: blocks with which the step computes although nobody loads them: orders could not be made."""

    push: PushCommands = field(default_factory=PushCommands)
    land: LandCommands = field(default_factory=LandCommands)
    cache: CacheOrders = field(default_factory=CacheOrders)
    bell: str = ""
    unloaded: list[int] = field(default_factory=list)


@dataclass
class StepResults(KVConnectorWorkerMetadata):
    """Worker to scheduler, every step. arrived: waiting requests that are reported to vLLM now, by each rank once.
    num_watched: transfers and hand-offs whose end comes without a message; num_loading: loads from the cache, whose end
    rings the bell."""

    push: PushResults = field(default_factory=PushResults)
    land: LandResults = field(default_factory=LandResults)
    cache: CacheResults = field(default_factory=CacheResults)
    arrived: list[Arrived] = field(default_factory=list)
    num_watched: int = 0
    num_loading: int = 0

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """What two tensor-parallel ranks answer together; the scheduler's halves know how many there are."""
        assert isinstance(other, StepResults)
        return StepResults(
            push=self.push.with_those_of(other.push),
            land=self.land.with_those_of(other.land),
            cache=self.cache.with_those_of(other.cache),
            arrived=self.arrived + other.arrived,
            num_watched=self.num_watched + other.num_watched,
            num_loading=self.num_loading + other.num_loading,
        )
