"""One engine as the cache sees it: requests that arrive, compute block by block, load, finish; no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from core.clock import Clock, SystemClock
from kvcache import wire
from kvcache.arena import Arena
from kvcache.client import CacheClient, fetch_arena
from kvcache.copiers import Copiers
from kvcache.host_copies import HostReads
from kvcache.loader import Loader
from kvcache.orders import CacheResults, Loaded
from kvcache.partial import PartialBlocks, root_key
from kvcache.prompt import KeyedPrompt
from kvcache.reader import SEARCH_BUDGET_S, Reader
from kvcache.shape import BlockShape
from kvcache.storer import Storer
from kvcache.writer import Writer
from tests.kvcache.places import BLOCK_BYTES, LAYERS, SPACE, Engine, key
from tests.poll import until
from transport.faultpoint import FaultPoint

BLOCK_SIZE = 32
ROOT = root_key(SPACE, "")


class Instance:
    """Scheduler and worker side of one engine over a server's socket."""

    def __init__(
        self,
        socket: str,
        name: str = "engine",
        clock: Clock | None = None,
        shape: BlockShape | None = None,
        budget_s: float = SEARCH_BUDGET_S,
    ) -> None:
        """budget_s: for a look-up; more of it where a test is not about it, for busy machines."""
        clock = clock or SystemClock()
        self.socket = socket
        self.engine = Engine()
        self.client = CacheClient(socket, wire.Hello(name, "boot", BLOCK_BYTES, shape=shape))
        self.reader = Reader(self.client, BLOCK_SIZE, clock, budget_s)
        self.writer = Writer(self.client, BLOCK_SIZE, clock)
        arena = Arena(self.engine.regions, lambda: fetch_arena(socket, name))
        self.copiers = Copiers()
        self.loader = Loader(arena, HostReads(self.copiers, FaultPoint()), clock)
        self.storer = Storer(arena, LAYERS, clock, FaultPoint())
        self.loader.prepare("")
        until(lambda: self.client.is_connected, what="the connection")
        until(lambda: arena.get(self.client.arena_id), what="the arena")

    def arrive(self, request: str, numbers: Sequence[int], tail: Sequence[int] = (0,), *, computes: bool = True) -> int:
        """Asks for a prompt of these blocks and the tail's tokens; returns the tokens that may be loaded."""
        prompt = self.prompt(request, numbers, tail)
        self.reader.arrive(prompt, reserve=computes)
        self.writer.arrive(prompt, asked=computes)
        until(lambda: self.look_up(request, numbers, tail) is not None, what="the look-up's end")
        return self.look_up(request, numbers, tail) or 0

    def prompt(self, request: str, numbers: Sequence[int], tail: Sequence[int] = (0,)) -> KeyedPrompt:
        """Of these blocks and the tail's tokens."""
        keys = [key(n) for n in numbers]
        token_ids = [n for n in numbers for _ in range(BLOCK_SIZE)] + list(tail)
        return KeyedPrompt(request, len(token_ids), keys, PartialBlocks(ROOT, keys, token_ids, BLOCK_SIZE))

    def look_up(self, request: str, numbers: Sequence[int], tail: Sequence[int] = (0,)) -> int | None:
        return self.reader.look_up(request, len(numbers) * BLOCK_SIZE + len(tail), 0)

    def compute(
        self,
        request: str,
        numbers: Sequence[int],
        num_blocks: int,
        num_more: int = 0,
        *,
        spoils: Callable[[], object] = lambda: None,
    ) -> int:
        """One step after which so many blocks and tokens more are computed; block i lies in the engine's block i.
        Returns how many were stored. spoils: called when every layer but the last is stored."""
        self.writer.granted(request, self.reader.grants(request))
        num_tokens = num_blocks * BLOCK_SIZE + num_more
        self.writer.scheduled(request, [key(n) for n in numbers], num_tokens, list(range(16)))
        return self.step(spoils)

    def step(self, spoils: Callable[[], object] = lambda: None) -> int:
        """The worker's part of a step with the stores that are due."""
        self.storer.begin_step(self.writer.take_stores())
        for layer in range(LAYERS - 1):
            self.storer.save_layer(layer)  # the last layer's hook is never called: the sweep must find it
        spoils()
        results = CacheResults()
        self.storer.end_step(results)
        for stored in results.stored:
            self.writer.on_stored(stored)
        return sum(len(stored.blocks) for stored in results.stored)

    def load(self, request: str, num_tokens: int, block_ids: Sequence[int]) -> Loaded:
        """Loads so many tokens into these blocks."""
        assert self.reader.load(request, block_ids, 0, num_tokens)
        for load in self.reader.take_loads():
            self.loader.start(load)
        (loaded,) = until(self.loader.ended, what="the load")
        self.reader.on_loaded(loaded)
        return loaded

    def finish(self, request: str) -> None:
        self.reader.finished(request)
        self.writer.finished(request)

    def close(self) -> None:
        self.loader.close()
        self.copiers.close()
        self.client.close()
