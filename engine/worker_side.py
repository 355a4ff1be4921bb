"""The connector's half that lives in vLLM's worker: owns the transports and moves blocks around the forward pass."""

from __future__ import annotations

import torch

from core.clock import SystemClock
from core.layout import KVLayout
from decode.lander import Lander
from engine.arrivals import Arrivals, Part
from engine.cache_worker import CacheWorker
from engine.layout import regions_of
from engine.memory import CacheMemory
from engine.settings import ConnectorSettings
from engine.steps import Handshake, StepOrders, StepResults
from kvcache.arena import Share
from kvcache.orders import CacheResults
from prefill.connections import Connections
from prefill.prober import Prober
from prefill.pusher import PagedCache, Pusher
from transport import native
from transport.base import Memory, Transport
from transport.device import Device
from transport.device_digest import DeviceDigests
from transport.device_schemes import device_transports
from transport.digest import HostSum
from transport.door import Door
from transport.faultpoint import FaultPoint
from transport.faulty import FaultyTransport, faults_of
from transport.guarded import GuardedTransport
from transport.schemes import make_transport, wanted_schemes
from transport.scratch import Scratch, ScratchLandings


class WorkerSide:
    """One worker's memory, transports, pushes and landings. Lives in the worker's thread. `share`: which of the
    tensor-parallel ranks it is. device: in whose memory its KV cache lies; None: the host's."""

    def __init__(
        self, settings: ConnectorSettings, layout: KVLayout, share: Share, device: Device | None = None
    ) -> None:
        self._settings = settings
        self._layout = layout
        self._share = share
        self._device = device
        self._digests = DeviceDigests(device) if device is not None else None
        self._clock = SystemClock()
        self._memory: CacheMemory | None = None
        self._layers: dict[str, int] = {}
        self._transports = {scheme: _guarded(each, settings) for scheme, each in _transports(settings, device).items()}
        self._connections = Connections(self._transports, self._clock)
        self._door = Door()
        self._scratch: Scratch | None = None
        self._prober: Prober | None = None
        self._pusher: Pusher | None = None
        self._lander: Lander | None = None
        self._cache: CacheWorker | None = None
        self._arrivals = Arrivals()
        self._on_trial: dict[str, set[int]] = {}
        self._unloaded: set[int] = set()

    def memory_context(self) -> CacheMemory | None:
        """The context in which vLLM allocates its KV cache; None where it takes it from a GPU."""
        if self._device is not None and not self._settings.device:
            return None
        self._memory = CacheMemory(self._allocate)
        return self._memory

    def register(self, kv_caches: dict[str, torch.Tensor], num_blocks: int) -> None:
        """The KV cache exists: make it known to every transport."""
        regions = regions_of(kv_caches, num_blocks)
        if self._device is None:
            native.prepare(sum(region.num_blocks * region.stride for region in regions))
        self._layers = {name: index for index, name in enumerate(kv_caches)}
        for transport in self._transports.values():
            for region in regions:
                transport.register(region)
        self._scratch = Scratch(self._transports, regions[0].device)
        self._prober = Prober(self._connections, ScratchLandings(self._transports), self._door, self._clock)
        faults, begin_sum = FaultPoint(self._settings.fault), HostSum if self._digests is None else self._digests.begin
        cache = PagedCache(regions, self._layout.block_size, begin_sum)
        self._pusher = Pusher(self._connections, cache, self._clock, faults, self._share.rank)
        self._lander = Lander(self._transports, regions, self._clock, faults, self._share.rank, begin_sum)
        if self._settings.cache:
            self._cache = CacheWorker(self._settings, regions, faults, self._share, self._device)

    def handshake(self) -> Handshake:
        """What the scheduler's side offers to peers."""
        schemes = [(scheme, transport.describe()) for scheme, transport in self._transports.items()]
        return Handshake(schemes, self._door.address)

    def begin(self, orders: StepOrders) -> None:
        """Before the forward pass."""
        self._unloaded = set(orders.unloaded)
        self._on_trial = {
            load.request_id: {piece.block_id for piece in load.pieces} for load in orders.cache.loads if load.in_step
        }
        if self._pusher is None or self._lander is None:
            return
        for arm in orders.land.arm:
            self._arrivals.expect(arm.request_id, Part.PEER)
        for load in orders.cache.loads:
            self._arrivals.expect(load.request_id, Part.CACHE)
        self._lander.begin_step(orders.land)
        self._pusher.begin_step(orders.push)
        if self._cache is not None:
            self._cache.begin(orders.cache, orders.bell)
            if self._unloaded:
                self._cache.spoil()

    def load_in_step(self) -> None:
        """Right before the forward pass of a step with loads of its own."""
        if self._cache is not None:
            self._cache.load_in_step()

    def wait_for_layer(self, layer_name: str) -> None:
        """Right before one layer's attention."""
        if self._cache is not None:
            self._cache.wait_for(self._layers[layer_name])

    def layer_done(self, layer_name: str) -> None:
        """Right after one layer of the forward pass: first what a peer waits for."""
        layer = self._layers[layer_name]
        if self._pusher is not None:
            self._pusher.save_layer(layer)
        if self._cache is not None:
            self._cache.layer_done(layer)

    def forward_done(self) -> None:
        """After the forward pass."""
        if self._pusher is not None:
            self._pusher.sweep()

    def end(self) -> StepResults:
        """After the forward pass: what has ended."""
        if self._pusher is None or self._lander is None:
            return StepResults()
        push, land = self._pusher.end_step(), self._lander.end_step()
        num_watched = self._pusher.num_in_flight() + self._lander.num_waiting()
        cache, num_loading = CacheResults(), 0
        if self._cache is not None:
            cache = self._cache.end()
            num_loading = self._cache.num_running()
        for received in land.received:
            self._arrivals.end(received.request_id, Part.PEER)
        for lost in land.lost:
            self._arrivals.end(lost.request_id, Part.PEER, lost.why or "lost")
        for loaded in cache.loaded:
            self._arrivals.end(loaded.request_id, Part.CACHE, loaded.why, loaded)
            if loaded.in_step and not loaded.why:
                self._on_trial.pop(loaded.request_id, None)
        return StepResults(push, land, cache, self._arrivals.take(), num_watched, num_loading)

    def bad_blocks(self) -> set[int]:
        """After `end`: blocks with which the step has computed, and which are not what they should be."""
        return self._unloaded.union(*self._on_trial.values())

    def close(self) -> None:
        """Ends every thread and connection."""
        if self._cache is not None:
            self._cache.close()
        if self._pusher is not None:
            self._pusher.close()
        if self._prober is not None:
            self._prober.close()
        if self._digests is not None:
            self._digests.close()
        for transport in self._transports.values():
            transport.close()

    def _allocate(self, num_bytes: int) -> Memory | None:
        for transport in self._transports.values():
            memory = transport.allocate(num_bytes)
            if memory is not None:
                return memory
        return None


def _transports(settings: ConnectorSettings, device: Device | None) -> dict[str, Transport]:
    """What this worker offers, best first. Raises ConfigError for what cannot run here."""
    keys = settings.read_keys()
    if device is not None:
        if not settings.device:
            wanted_schemes(settings.transport, has_keys=keys is not None)
        return device_transports(settings.transport, device, settings.host, keys, settings.transport_options)
    return {
        scheme: make_transport(scheme, settings.host, keys, settings.transport_options)
        for scheme in wanted_schemes(settings.transport, has_keys=keys is not None)
    }


def _guarded(transport: Transport, settings: ConnectorSettings) -> GuardedTransport:
    faults = faults_of(settings.faulty, transport.scheme)
    return GuardedTransport(FaultyTransport(transport, faults) if faults else transport)
