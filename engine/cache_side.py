"""The engine's end of the KV cache beside its scheduler: vLLM's requests. Beside its worker: engine/cache_worker.py.

Names each full block of a request by its BlockKey, from vLLM's chained block hashes and everything they leave out.
Threads: the engine core's thread; the threads that talk to the server are `kvcache/`'s own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from core.clock import SystemClock
from core.errors import UnsupportedError
from core.handoff import Handoff, Label
from core.layout import KVLayout
from core.report import FromCache
from engine.identity import adapter_identity
from engine.ranks import OfAllRanks
from engine.settings import ConnectorSettings
from kvcache import wire
from kvcache.arena import slot_bytes
from kvcache.client import CacheClient
from kvcache.keys import BlockKey, block_key, join_keys, namespace, tenant_of
from kvcache.orders import CacheOrders, CacheResults, Loaded
from kvcache.pace import Pace
from kvcache.partial import PartialBlocks, root_key
from kvcache.prompt import KeyedPrompt
from kvcache.reader import Reader
from kvcache.shape import ELEMENT_BYTES, BlockShape
from kvcache.writer import Writer
from transport.runs import heads_of

HASHES = ("sha256", "sha256_cbor")
"""vLLM's block hashes that are the same in every process; the others begin with random bytes."""

ANSWER_WAIT_S = 0.002
"""Of an idle engine, for an answer that takes a tenth of it; an empty step takes longer."""


def refuse_hash(algorithm: str) -> None:
    """Raises UnsupportedError for block hashes that other processes could not find again."""
    if algorithm not in HASHES:
        raise UnsupportedError(
            f"--prefix-caching-hash-algo {algorithm}: its hashes differ between processes, so nothing could be shared; "
            f"use {' or '.join(HASHES)}"
        )


def shape_of(layout: KVLayout) -> BlockShape | None:
    """How heads lie in a block; None where that is not known for certain.

    vLLM's CPU attention keeps one head's keys of a block and then its values in one piece each, packed as the
    processor wants them inside (`isa`).
    """
    if not layout.isa or layout.order != "LBHNC" or layout.dtype not in ELEMENT_BYTES:
        return None
    shape = BlockShape(layout.dtype, layout.num_layers, layout.block_size * layout.head_size)
    return shape if layout.block_bytes == 2 * layout.num_kv_heads * shape.head_bytes else None


def part_bytes(layout: KVLayout, num_ranks: int) -> int:
    """Of one block over all layers, on one of so many tensor-parallel ranks; heads may be on several."""
    return layout.head_bytes * len(heads_of(layout.num_kv_heads, num_ranks, 0)) * layout.num_layers


def by_tier(loaded: Loaded, pace: Pace) -> list[FromCache]:
    """What each tier gave of one load."""
    parts = []
    for tier, num_blocks in loaded.tiers.items():
        share, tokens = num_blocks / max(loaded.num_blocks, 1), loaded.tokens[tier]
        num_bytes, seconds, waited_s = round(loaded.num_bytes * share), loaded.seconds * share, loaded.waited_s * share
        compute_s = pace.compute_s(tokens)
        saved_s = 0.0 if compute_s is None else compute_s - waited_s
        parts.append(FromCache(tier, tokens, num_bytes, seconds, saved_s, waited_s, loaded.in_step))
    return parts


@dataclass(frozen=True)
class Owner:
    """Whose blocks they are: one start of an instance of so many tensor-parallel ranks."""

    boot_id: str
    num_ranks: int = 1


class CacheScheduler:
    """What requests take from the cache and leave there."""

    def __init__(
        self, settings: ConnectorSettings, layout: KVLayout, owner: Owner, hash_algorithm: str, wake: Callable[[], None]
    ) -> None:
        self._identity = layout.identity_of_blocks(owner.num_ranks)
        self._block_size = layout.block_size
        self._hash_algorithm = hash_algorithm
        self._loaded = OfAllRanks(owner.num_ranks, Loaded.with_that_of)
        block_bytes = slot_bytes(part_bytes(layout, owner.num_ranks), owner.num_ranks)
        shape = shape_of(layout) if owner.num_ranks == 1 else None
        hello = wire.Hello(settings.name, owner.boot_id, block_bytes, shape=shape)
        clock = SystemClock()
        self._client = CacheClient(settings.cache, hello, wake)
        self._reader = Reader(self._client, layout.block_size, clock)
        self._writer = Writer(self._client, layout.block_size, clock)
        self._keys: dict[str, list[BlockKey]] = {}
        self._spaces: dict[str, bytes] = {}
        self._unnamed: dict[str, wire.Name] = {}

    def arrived(self, request: Any, *, computes: bool, ticket: Handoff | None = None) -> None:
        """A request is new: ask what is there. computes: this instance will compute and store what is not; otherwise
        its peer does. The ticket's label names the blocks of its prompt, wherever they are computed; its deadline
        bounds the look-up."""
        request_id = request.request_id
        if request_id in self._keys:
            return
        prompt = self._prompt_of(request, ticket)
        label = None if ticket is None else ticket.label
        stores = label is not None or self._reader.pace.is_worth_storing()
        self._reader.arrive(prompt, reserve=computes and stores)
        if stores:
            self._writer.arrive(prompt, asked=True)
        if label is not None:
            self._name(prompt, label)

    def look_up(self, request: Any, found_tokens: int, *, is_idle: bool = False) -> int | None:
        """Tokens to load after those found in the engine's own cache; None: not known yet. is_idle: the engine has
        nothing else to do, and waits a moment for an answer."""
        if request.skip_reading_prefix_cache:
            return 0
        wait_s = ANSWER_WAIT_S if is_idle else 0.0
        return self._reader.look_up(request.request_id, request.num_prompt_tokens, found_tokens, wait_s)

    def fits_a_step(self, request_id: str, num_tokens: int, *, is_alone: bool) -> bool:
        """Whether loading so many tokens may be part of the step that computes with them."""
        return self._reader.fits_a_step(request_id, num_tokens, is_alone=is_alone)

    def allocated(
        self, request_id: str, block_ids: Sequence[int], found_tokens: int, num_tokens: int, *, in_step: bool = False
    ) -> None:
        """The engine has allocated blocks, `num_tokens` of which are to be loaded, in this step or before the request
        is scheduled."""
        self._writer.granted(request_id, self._reader.grants(request_id))
        if num_tokens > 0:
            self._reader.load(request_id, block_ids, found_tokens, num_tokens, in_step=in_step)
        else:
            self._reader.started(request_id)

    def computes(self, request_id: str) -> None:
        """The peer does not compute this request's prompt after all."""
        self._writer.computes(request_id)

    def scheduled(self, request: Any, num_tokens: int, block_ids: Callable[[], Sequence[int]]) -> None:
        """When this step ends, `num_tokens` of the request are computed."""
        request_id = request.request_id
        if self._writer.is_due(request_id, num_tokens, len(request.block_hashes)):
            self._writer.scheduled(request_id, self._keys_of(request), num_tokens, block_ids())

    def computed(self, num_tokens: int, seconds: float) -> None:
        """A step that computed, among others, so many prompt tokens took so long."""
        self._reader.pace.computed(num_tokens, seconds)

    def given(self, loaded: Loaded) -> list[FromCache]:
        """What one load took from each tier."""
        return by_tier(loaded, self._reader.pace)

    def orders(self) -> CacheOrders:
        """For the step that is about to run."""
        return CacheOrders(self._reader.take_loads(), self._writer.take_stores())

    def has_loads(self) -> bool:
        """Whether a load waits for the step that is about to run."""
        return self._reader.has_loads()

    def results(self, results: CacheResults) -> None:
        """The worker's answer."""
        for loaded in self._loaded.take(results.loaded):
            self._reader.on_loaded(loaded)
        for stored in results.stored:
            self._writer.on_stored(stored)

    def finished(self, request_id: str) -> None:
        """The engine is done with a request."""
        self._reader.finished(request_id)
        self._writer.finished(request_id)
        self._keys.pop(request_id, None)
        unnamed = self._unnamed.pop(request_id, None)
        if unnamed is not None:
            self._client.send(unnamed)

    def close(self) -> None:
        """Hangs up: the server then takes back what is held."""
        self._client.close()

    def _name(self, prompt: KeyedPrompt, label: Label) -> None:
        """Names the prompt's blocks at the server, now or, where nobody serves now, when the request ends."""
        num_blocks, partial = prompt.num_tokens // self._block_size, prompt.partials.last
        keys = prompt.keys[:num_blocks]
        num_tokens = prompt.num_tokens if partial else len(keys) * self._block_size
        named = wire.Name(label.name, join_keys(keys) + partial, num_tokens, label.ttl_s, label.pin, prompt.tenant)
        if not self._client.send(named):
            self._unnamed[prompt.request_id] = named

    def _prompt_of(self, request: Any, ticket: Handoff | None) -> KeyedPrompt:
        """Without partial blocks if it is more than token ids: what else it is stands in full blocks' hashes alone."""
        keys = self._keys_of(request)
        token_ids = request.prompt_token_ids or ()
        if request.mm_features or request.prompt_embeds is not None:
            token_ids = ()
        root = root_key(self._space_of(request.lora_request), request.cache_salt or "")
        partials = PartialBlocks(root, keys, token_ids, self._block_size)
        within_s = math.inf if ticket is None else ticket.timeout_s
        tenant = tenant_of(request.cache_salt)
        return KeyedPrompt(request.request_id, request.num_prompt_tokens, keys, partials, tenant, within_s)

    def _keys_of(self, request: Any) -> list[BlockKey]:
        """Of the request's full blocks, as far as its tokens are known."""
        keys = self._keys.setdefault(request.request_id, [])
        space = self._space_of(request.lora_request)
        keys.extend(block_key(space, bytes(block)) for block in request.block_hashes[len(keys) :])
        return keys

    def _space_of(self, lora: Any) -> bytes:
        path = lora.lora_path if lora is not None else ""
        if path not in self._spaces:
            adapter = adapter_identity(path) if path else b""
            self._spaces[path] = namespace(self._identity, self._hash_algorithm, adapter)
        return self._spaces[path]
