"""The engine's end of the KV cache beside its worker: its memory. Beside its scheduler: engine/cache_side.py.

Threads: the worker's thread; the threads that copy loads, and hash what a GPU has copied, are `kvcache/`'s own.
"""

from __future__ import annotations

from collections.abc import Sequence

from core.clock import SystemClock
from engine.settings import ConnectorSettings
from kvcache.arena import Arena, Share
from kvcache.client import fetch_arena
from kvcache.copiers import Copiers
from kvcache.copies import Reads, Writes
from kvcache.device_copies import DeviceReads, DeviceWrites
from kvcache.host_copies import HostReads, HostWrites
from kvcache.loader import Loader
from kvcache.orders import CacheOrders, CacheResults
from kvcache.step_loader import StepLoader
from kvcache.storer import Storer
from transport.base import Region
from transport.bell import Ringer
from transport.device import Device
from transport.faultpoint import FaultPoint

LOAD_WAIT_S = 0.003
"""Of a worker in an empty step, for the end of a load: another such step takes the loading thread's core away."""


class CacheWorker:
    """Copies between this worker's blocks, which are one tensor-parallel rank's, and the arena."""

    def __init__(
        self,
        settings: ConnectorSettings,
        regions: Sequence[Region],
        faults: FaultPoint,
        share: Share,
        device: Device | None = None,
    ) -> None:
        """device: in whose memory the regions lie; None: in the host's."""
        clock = SystemClock()
        path, name = settings.cache, settings.name
        self._arena = Arena(regions, lambda: fetch_arena(path, name), share, device)
        self._bell = ""
        self._ringer = Ringer()
        self._copiers = Copiers()
        reads: Reads = HostReads(self._copiers, faults)
        writes: Writes = HostWrites()
        if device is not None:
            reads, writes = DeviceReads(device, regions, self._copiers, faults), DeviceWrites(device, regions)
        self._reads = reads
        self._loader = Loader(self._arena, reads, clock, lambda: self._ringer.ring(self._bell))
        self._step_loader = StepLoader(self._arena, len(regions), self._copiers, clock, faults)
        self._storer = Storer(self._arena, len(regions), clock, faults, writes)
        self._computes = False
        self._loader.prepare("")

    def begin(self, orders: CacheOrders, bell: str) -> None:
        """Before the forward pass. bell: to be rung when a load has ended."""
        self._computes = False
        self._bell = bell
        self._step_loader.order([load for load in orders.loads if load.in_step])
        for load in orders.loads:
            if not load.in_step:
                self._loader.start(load)
        for store in self._storer.begin_step(orders.stores):
            self._loader.prepare(store.arena_id)

    def spoil(self) -> None:
        """Nobody knows who computes in this step with blocks that nobody loads: nothing of it is stored."""
        self._storer.spoil()

    def load_in_step(self) -> None:
        """Right before the forward pass, of a step that has loads of its own."""
        self._step_loader.begin()

    def wait_for(self, layer: int) -> None:
        """Right before one layer's attention."""
        self._step_loader.wait_for(layer)

    def layer_done(self, layer: int) -> None:
        """Right after one layer of the forward pass."""
        self._computes = True
        self._storer.save_layer(layer)

    def end(self) -> CacheResults:
        """After the forward pass."""
        in_step = self._step_loader.end()
        self._storer.spoil({loaded.request_id for loaded in in_step if loaded.why})
        results = CacheResults(loaded=in_step + self._loader.ended(0.0 if self._computes else LOAD_WAIT_S))
        self._storer.end_step(results)
        return results

    def num_running(self) -> int:
        """Loads whose end rings the bell."""
        return self._loader.num_running()

    def close(self) -> None:
        """Ends the threads."""
        self._loader.close()
        self._reads.close()
        self._storer.close()
        self._copiers.close()
        self._arena.close()
        self._ringer.close()
