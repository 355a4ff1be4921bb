"""The fourth part: the arena by itself. A real cache server, and this process as its client, without an engine.

look-up    a prompt's keys to the server and its answer back, through the client's thread, as an engine asks
store      blocks of a KV cache into the arena, layer by layer, with their digests
load       the same blocks back into other places, compared
memcpy     the same bytes in the same pieces
"""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from benchmarks import cores, yards
from benchmarks.bench import BLOCK_TOKENS, Bench
from benchmarks.cache_results import LOOKUP_KEY, LookupCell
from benchmarks.memcpy import BROOM_BYTES, memory_of, sweep
from benchmarks.part_tiers import found_tokens
from cluster.cache import CacheMember
from cluster.processes import stop_groups
from core.errors import BatonError
from kvcache import wire
from kvcache.arena import MappedArena, add, key_summand
from kvcache.client import CacheClient, fetch_arena
from kvcache.keys import KEY_BYTES, join_keys
from kvcache.spec import CacheSpec
from transport.base import Region
from transport.mapping import map_foreign

LOOK_UPS = 2000
PASSES = 5
_TIMEOUT_S = 20.0
_ARENA = "512MiB"
_KV_BLOCKS = 4
"""The KV cache has so many times the blocks of one prompt."""


def weight(bench: Bench) -> float:
    """As much as computing a long prompt."""
    return float(bench.options.prompt_tokens)


def measure(bench: Bench) -> None:
    """One cell."""
    bench.bar.show("look-ups, stores and loads of the arena")
    if not bench.state.has(LOOKUP_KEY):
        bench.state.add(_cell(bench))
    bench.bar.advance(weight(bench))


def _cell(bench: Bench) -> LookupCell:
    recipe = bench.options.recipe
    layers = recipe.shape.num_layers
    layer_block_bytes = recipe.token_bytes * BLOCK_TOKENS // layers
    num_blocks = found_tokens(bench.options.prompt_tokens) // BLOCK_TOKENS
    keys = [hashlib.blake2b(b"%d" % index, digest_size=KEY_BYTES).digest() for index in range(num_blocks)]
    with closing(yards.Prompt(num_blocks, layers, layer_block_bytes)) as prompt:
        memcpy = yards.memcpy(prompt, bench.clock, bench.machine.cache_bytes)
    with _served(bench.site.folder.subfolder("lookup")) as socket, cores.only({cores.pair()[0]}):
        answered = threading.Event()
        client = CacheClient(socket, wire.Hello("bench", "bench", layers * layer_block_bytes), answered.set)
        try:
            with closing(_Engine(socket, num_blocks, layers, layer_block_bytes)) as engine:
                offsets = _granted(client, keys)
                store_s, digests = engine.store(offsets, keys, bench.clock.monotonic_s)
                written = [wire.Written(*each) for each in zip(keys, offsets, digests, strict=True)]
                client.send(wire.Commit(written))
                load_s = engine.load(written, bench.clock.monotonic_s)
                round_trips = _look_ups(client, keys, answered, bench.clock.monotonic_s)
        finally:
            client.close()
    return LookupCell(num_blocks, layers * layer_block_bytes, round_trips, store_s, load_s, memcpy)


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    """The socket of a cache server without an engine."""
    member = CacheMember(CacheSpec.parse(_ARENA), folder)
    member.start()
    try:
        _until(member.is_ready, "the cache server")
        yield str(member.socket)
    finally:
        if member.child:
            stop_groups([member.child])
        member.release()


class _Engine:
    """Memory as an engine's KV cache lies, with the arena mapped beside it."""

    def __init__(self, socket: str, num_blocks: int, layers: int, layer_block_bytes: int) -> None:
        pool = num_blocks * _KV_BLOCKS
        self._dice = random.Random(0)
        self._pool = range(pool)
        self._memory = memory_of(layers * pool * layer_block_bytes)
        self._broom = memory_of(BROOM_BYTES)
        at, step = self._memory.address, pool * layer_block_bytes
        regions = [
            Region(layer, at + layer * step, layer_block_bytes, layer_block_bytes, pool) for layer in range(layers)
        ]
        self._layers = range(layers)
        fd, num_bytes, _ = fetch_arena(socket, "bench")
        try:
            self._mapping = map_foreign(fd, num_bytes)
        finally:
            os.close(fd)
        self._mapping.populate()
        self._arena = MappedArena(self._mapping, regions)

    def store(
        self, offsets: Sequence[int], keys: Sequence[bytes], now: Callable[[], float]
    ) -> tuple[tuple[float, ...], list[int]]:
        """Seconds of each pass, the first one not counted, and the blocks' digests after the last."""
        seconds, digests = [], []
        for _ in range(PASSES + 1):
            ids = self._dice.sample(self._pool, len(offsets))
            sweep(self._broom)
            begun_s = now()
            digests = [key_summand(key) for key in keys]
            for layer in self._layers:
                for index, (block_id, offset) in enumerate(zip(ids, offsets, strict=True)):
                    digests[index] = add(digests[index], self._arena.write_layer(layer, block_id, offset))
            seconds.append(now() - begun_s)
        return tuple(seconds[1:]), digests

    def load(self, written: Sequence[wire.Written], now: Callable[[], float]) -> tuple[float, ...]:
        """Seconds of each pass, the first one not counted. Raises BatonError if a block is not what was stored."""
        seconds = []
        for _ in range(PASSES + 1):
            ids = self._dice.sample(self._pool, len(written))
            sweep(self._broom)
            begun_s = now()
            for block_id, block in zip(ids, written, strict=True):
                if not self._arena.read_block(block_id, block.offset, block.key, block.digest):
                    raise BatonError("a block in the arena is not what was stored")
            seconds.append(now() - begun_s)
        return tuple(seconds[1:])

    def close(self) -> None:
        """Gives the memories back."""
        for memory in (self._memory, self._broom, self._mapping):
            memory.close()


def _granted(client: CacheClient, keys: Sequence[bytes]) -> list[int]:
    """A place for every block."""
    _until(lambda: client.is_connected, "the connection to the cache server")
    number = client.reserve(join_keys(keys))
    answers: list[wire.Found | wire.Granted] = []

    def has_come() -> bool:
        answer = client.take(number)
        answers.extend([answer] if answer is not None else [])
        return bool(answers)

    _until(has_come, "the cache server's answer")
    offsets = [grant.offset for grant in answers[0].grants]
    if len(offsets) != len(keys):
        raise BatonError(f"{len(offsets)} of {len(keys)} blocks got a place in an empty arena")
    return offsets


def _look_ups(
    client: CacheClient, keys: Sequence[bytes], answered: threading.Event, now: Callable[[], float]
) -> tuple[float, ...]:
    """Microseconds from the question to the answer."""
    joined, times = join_keys(keys), []
    for index in range(LOOK_UPS):
        answered.clear()
        begun_s = now()
        number = client.search(joined, reserve=False)
        while (answer := client.take(number)) is None:
            if not answered.wait(_TIMEOUT_S):
                raise BatonError("the cache server does not answer")
            answered.clear()
        times.append((now() - begun_s) * 1e6)
        if not isinstance(answer, wire.Found) or len(answer.slots) != len(keys):
            raise BatonError(f"look-up {index} did not find what was stored")
        client.send(wire.Release(number))
    return tuple(times)


def _until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while not is_so():
        if time.monotonic() > deadline:
            raise BatonError(f"waited {_TIMEOUT_S:.0f} s in vain for {what}")
        time.sleep(0.001)
