"""The connector's half beside vLLM's scheduler: turns its hooks into words of `prefill/`, `decode/` and `kvcache/`.

Threads: vLLM's engine core calls every hook from one thread; the control plane's thread delivers messages, lost
peers and ticks to the halves themselves (`engine/correspondence`); the join thread asks for `info`. The senders' and
receivers' own locks keep them apart; everything of this file belongs to the engine's thread alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.logger import init_logger

from core.clock import SystemClock
from core.layout import KVLayout
from core.report import Report
from core.topology import InstanceInfo
from decode.accounts import Accounts
from decode.admission import Capacity
from decode.incoming import Offer
from decode.receiver import Receiver
from engine.acquaintances import Acquaintances, OwnRank
from engine.arrivals import Arrived
from engine.cache_side import CacheScheduler, Owner, refuse_hash
from engine.correspondence import Correspondence
from engine.internals import IdleSleep
from engine.ranks import OfAllRanks
from engine.requests import EngineRequest, EngineRequests
from engine.settings import ConnectorSettings
from engine.steps import Handshake, StepOrders, StepResults
from engine.trials import Chunk, Trials
from kvcache.orders import CacheOrders
from prefill.sender import Gate, Sender
from transport.bell import Bell
from transport.faultpoint import FaultPoint
from transport.join import JoinThread
from transport.ports import Ports

IDLE_SLEEP_S = 0.1
"""Longest sleep of an engine that only waits; deadlines are watched by the control plane's thread."""

GROWTH_BLOCKS = 4
"""Blocks that a running request is assumed to need soon, at most: head-room that hand-offs may not take."""

_log = init_logger("vllm.baton")


@dataclass(frozen=True)
class Pool:
    """The engine's KV cache: blocks, and tensor-parallel ranks that keep each of them, heads apart. loads_in_step:
    whether a step may wait for what it loads itself: it is scheduled when all is known of the one before, and the
    processor does the loading."""

    num_blocks: int
    num_ranks: int
    loads_in_step: bool = True


class SchedulerSide:
    """One instance's hand-off scheduling."""

    def __init__(
        self, settings: ConnectorSettings, layout: KVLayout, pool: Pool, hash_algorithm: str = "sha256"
    ) -> None:
        self._settings = settings
        self._layout = layout
        self._fingerprint = layout.fingerprint()
        self._pool = pool
        self._sleep = IdleSleep()
        self._free_blocks: Callable[[], int] = lambda: 0
        self._num_watched = 0
        self._num_loading = 0
        self._begun_s = 0.0
        self._num_prompt_tokens = 0
        self._has_computed = False
        self._num_gated = 0
        self._schemes: list[str] = []
        self._join: JoinThread | None = None
        self._acquaintances: Acquaintances | None = None
        self._receiver: Receiver | None = None  # until `start`; callbacks may come before that
        self._correspondence = Correspondence(settings, self._fingerprint, pool.num_ranks)
        self.me = self._correspondence.me
        self._requests = EngineRequests(self.me.boot_id)
        self._ports = Ports(
            send=self._correspondence.send,
            wake=self._sleep.wake,
            report=self._report,
            clock=SystemClock(),
            faults=FaultPoint(settings.fault),
        )
        self._sender = Sender(self.me, layout, self._ports)
        self._accounts = Accounts(settings.name, self._report)
        self._cache: CacheScheduler | None = None
        self._bell: Bell | None = None
        if settings.cache:
            refuse_hash(hash_algorithm)
            self._bell = Bell(self._sleep.wake)
            owner = Owner(self.me.boot_id, pool.num_ranks)
            self._cache = CacheScheduler(settings, layout, owner, hash_algorithm, self._sleep.wake)
        self._arrived = OfAllRanks(pool.num_ranks, Arrived.with_that_of)
        self._trials = Trials()

    # ---- start and end ----

    def start(self, handshakes: list[Handshake]) -> None:
        """Every rank's memory is known: receive, and tell the proxy that this instance exists."""
        settings = self._settings
        schemes = [handshake.schemes for handshake in handshakes]
        self._schemes = [scheme for scheme, _ in schemes[0]]
        offer = Offer(self._layout, schemes, settings.full_digest, settings.audit)
        self._receiver = Receiver(self.me, offer, self._ports, self._accounts, settings.limits)
        ranks = [OwnRank(handshake.schemes, handshake.door) for handshake in handshakes]
        acquaintances = Acquaintances(self.me, self._layout, ranks, self._correspondence.send, self._ports.clock)
        self._acquaintances = acquaintances
        self._correspondence.introduce(self._sender, self._receiver, acquaintances)
        if settings.join:
            self._join = JoinThread(settings.join, self._info, settings.read_keys(), acquaintances.on_peers)
        _log.info(
            "baton instance %s (%s): control %s, transports %s, tensor parallel size %d, %s",
            self.me.name,
            settings.role.value,
            self.me.control,
            ", ".join(self._schemes),
            self.me.num_ranks,
            "encrypted" if settings.keys else "not encrypted",
        )

    def watch_pool(self, free_blocks: Callable[[], int], evict: Callable[[set[int]], None]) -> None:
        """How to ask the engine's block pool for its free blocks, and to make its prefix cache forget some."""
        self._free_blocks = free_blocks
        if self._pool.loads_in_step:
            self._trials.watch(evict)

    def close(self) -> None:
        """Says good-bye to the proxy and ends the threads."""
        if self._join is not None:
            self._join.close()
        self._correspondence.close()
        if self._acquaintances is not None:
            self._acquaintances.close()
        if self._cache is not None:
            self._cache.close()
        if self._bell is not None:
            self._bell.close()

    # ---- hooks, in the order of one step ----

    def arrived(self, request: Any) -> None:
        """A request is new. One that P computes for us is looked for in the cache, but not stored by us."""
        if self._cache is not None:
            known = self._requests.of(request)
            self._cache.arrived(request, computes=not known.awaits_peer, ticket=known.ticket)

    def num_tokens_from_outside(self, request: Any, found_tokens: int) -> int | None:
        """Tokens to take, after those found locally, from the cache and then from P; None: ask again in the next
        step."""
        is_in_doubt = found_tokens > 0 and self._trials.are_open()  # what it has found may be what is on trial
        num_tokens = None if is_in_doubt else self._plan(request, found_tokens)
        self._num_gated += num_tokens is None
        return num_tokens

    def loads_in_step(self, request: Any) -> bool:
        """Whether the tokens of the plan are loaded in the step that computes with them."""
        return self._requests.of(request).in_step

    def allocated(self, request: Any, block_ids: list[int], num_tokens: int) -> None:
        """The engine has allocated blocks; num_tokens of the prompt are to come from outside."""
        request_id, known = request.request_id, self._requests.of(request)
        is_again, known.is_allocated = known.is_allocated, True  # vLLM says so once more when the tokens have come
        cached, known.cached = min(known.cached, num_tokens), 0
        in_step, known.in_step = known.in_step and cached > 0, False
        if in_step:
            self._trials.begin(request_id, block_ids[known.found // self._layout.block_size :])
        if self._cache is not None:
            self._cache.allocated(request_id, block_ids, known.found, cached, in_step=in_step)
            is_short = known.found + num_tokens < request.num_prompt_tokens - 1
            if known.awaits_peer and is_short and not is_again:
                self._cache.computes(request_id)
        if known.ticket is None or self._receiver is None:
            return
        if known.sends:
            self._sender.started(request_id)
            return
        self._receiver.reserve(request_id, block_ids, num_tokens - cached, known.found, cached)
        if num_tokens == 0:
            self._accounts.found(request_id, known.ticket.id, request.num_prompt_tokens, known.found)

    def orders(self, scheduled: Any) -> StepOrders:
        """The worker's orders for the step that vLLM has just scheduled (a `SchedulerOutput`)."""
        self._idle(scheduled)
        self._begun_s = self._ports.clock.monotonic_s()
        self._num_prompt_tokens = 0
        self._has_computed = scheduled.total_num_scheduled_tokens > 0
        for request_id in scheduled.preempted_req_ids or ():
            self._sender.preempted(request_id)
        for request_id, num_new in scheduled.num_scheduled_tokens.items():
            self._note_chunk(scheduled, request_id, num_new)
        if self._receiver is None:
            return StepOrders()
        cache = self._cache.orders() if self._cache is not None else CacheOrders()
        bell = self._bell.name if self._bell is not None else ""
        loading = {load.request_id for load in cache.loads if load.in_step}
        unloaded = self._trials.block_ids(loading)
        return StepOrders(self._sender.take_commands(), self._receiver.take_commands(), cache, bell, unloaded)

    def blocks_on_trial(self) -> list[int]:
        """With which the step that vLLM has just scheduled computes, and which are filled meanwhile."""
        return self._trials.block_ids()

    def results(self, results: StepResults) -> set[str]:
        """The worker's answer. Returns engine requests whose blocks no transfer reads any more."""
        self._num_watched, self._num_loading = results.num_watched, results.num_loading
        if self._cache is not None and self._has_computed:
            self._cache.computed(self._num_prompt_tokens, self._ports.clock.monotonic_s() - self._begun_s)
        if self._receiver is not None:
            self._receiver.on_results(results.land)
        if self._cache is not None:
            self._cache.results(results.cache)
            for arrived in self._arrived.take(results.arrived):
                self._note_arrived(arrived)
            for request_id in self._trials.unanswered():
                self._note_arrived(Arrived(request_id, "the cache's loading failed"))
        return set(self._sender.on_results(results.push))

    def finished(self, request: Any, *, completed: bool) -> bool:
        """The engine is done with a request. True: keep its blocks until `results` names it."""
        request_id, known = request.request_id, self._requests.of(request)
        self._requests.forget(request_id)
        if self._cache is not None:
            self._cache.finished(request_id)
        if known.ticket is None or self._receiver is None:
            return False
        if known.sends:
            return self._sender.finished(request_id, completed=completed)
        self._receiver.finished(request_id)
        return False

    # ---- inside ----

    def _plan(self, request: Any, found_tokens: int) -> int | None:
        """[own prefix cache][the host's cache][P], in prefix order."""
        known = self._requests.of(request)
        known.found, known.in_step = found_tokens, False
        cached: int | None = 0
        is_idle = self._cache is not None and next(self._requests.allocated(), None) is None
        if self._cache is not None:
            cached = self._cache.look_up(request, found_tokens, is_idle=is_idle)
        if known.sends and self._receiver is not None and self._sender.admit(known.prompt()) is Gate.WAIT:
            return None
        if cached is None:
            return None
        known.cached = cached
        from_peer: int | None = 0
        if known.receives and self._receiver is not None:
            from_peer = self._receiver.look_up(known.prompt(), found_tokens + cached, self._capacity)
        if from_peer is None:
            return None
        known.in_step = cached > 0 and not from_peer and self._may_load_in_step(known, is_alone=is_idle)
        if from_peer:  # a block has one writer: where the cache's part ends in the middle of one, P writes it whole
            known.cached -= (found_tokens + cached) % self._layout.block_size
        return cached + from_peer

    def _may_load_in_step(self, known: EngineRequest, *, is_alone: bool) -> bool:
        """One in each step. What is sent to a peer is never on trial, nor what a random draw in vain would change."""
        if self._cache is None or known.sends or known.is_seeded:
            return False
        if self._trials.are_open() or not self._trials.are_possible():
            return False
        return self._cache.fits_a_step(known.request.request_id, known.cached, is_alone=is_alone)

    def _note_arrived(self, arrived: Arrived) -> None:
        """What the cache gave one request, or why not."""
        request_id, known = arrived.request_id, self._requests.get(arrived.request_id)
        trial = self._trials.end(request_id, is_lost=bool(arrived.why_lost))
        if self._cache is None:
            return
        if arrived.why_lost:
            self._cache.computes(request_id)
        if known is None or known.ticket is None or self._receiver is None:
            return
        ticket, num_prompt, loaded = known.ticket.id, known.request.num_prompt_tokens, arrived.loaded
        if arrived.why_lost:
            if not known.sends and (trial is not None or loaded is not None):
                self._receiver.load_lost(request_id, ticket, arrived.why_lost)
            if trial is not None:  # vLLM does not admit it anew
                self._accounts.found(request_id, ticket, num_prompt, known.found)
        elif loaded is not None and known.sends:
            self._sender.loaded(request_id, self._cache.given(loaded))
        elif loaded is not None:
            self._accounts.loaded(request_id, ticket, self._cache.given(loaded), num_prompt, known.found)
            if trial is not None and trial.chunk is not None:
                self._receiver.scheduled(request_id, ticket, *trial.chunk)

    def _note_chunk(self, scheduled: Any, request_id: str, num_new: int) -> None:
        known = self._requests.get(request_id)
        if known is None or not known.is_allocated or self._receiver is None:
            return
        done_before, num_prompt = known.request.num_computed_tokens, known.request.num_prompt_tokens
        self._num_prompt_tokens += max(min(num_new, num_prompt - done_before), 0)

        def block_ids() -> list[int]:
            return list(scheduled.kv_connector_block_state.resolve_block_ids(request_id)[0])

        if self._cache is not None:
            self._cache.scheduled(known.request, done_before + num_new, block_ids)
        if known.ticket is None or done_before >= num_prompt:
            return
        if known.sends:
            self._sender.chunk(request_id, min(done_before + num_new, num_prompt), block_ids())
        elif trial := self._trials.of(request_id):
            trial.chunk = Chunk(done_before, num_new, num_prompt)
        else:
            self._receiver.scheduled(request_id, known.ticket.id, done_before, num_new, num_prompt)

    def _idle(self, scheduled: Any) -> None:
        """Sleeps while there is nothing to compute and only a message, a new request or a load's end can change that.

        An empty step takes a loading worker's core away from it: on two cores half of the load's speed.
        """
        num_gated, self._num_gated = self._num_gated, 0
        if scheduled.total_num_scheduled_tokens or scheduled.finished_req_ids or self._num_watched:
            return
        if self._cache is not None and self._cache.has_loads():
            return
        if self._cache is not None and self._num_loading:
            self._sleep.sleep(IDLE_SLEEP_S)  # the bell ends it
            return
        waits = num_gated or (self._receiver is not None and self._receiver.num_waiting())
        if waits and not self._sender.num_busy():
            self._sleep.sleep(IDLE_SLEEP_S)

    def _capacity(self) -> Capacity:
        block_size = self._layout.block_size
        growth = 0
        for known in self._requests.allocated():
            request = known.request
            end_tokens = request.num_prompt_tokens + request.max_tokens
            left = -(-end_tokens // block_size) - -(-request.num_tokens // block_size)
            growth += max(0, min(left, GROWTH_BLOCKS))
        return Capacity(self._pool.num_blocks, self._free_blocks(), growth)

    def _info(self) -> InstanceInfo:
        return InstanceInfo(
            name=self.me.name,
            role=self._settings.role,
            url=self._settings.url,
            boot_id=self.me.boot_id,
            control=self.me.control,
            fingerprint=self._fingerprint,
            transports=list(self._schemes),
            block_size=self._layout.block_size,
            num_blocks=self._pool.num_blocks,
            free_blocks=self._free_blocks(),
            pid=os.getpid(),
            silent_peers=self._receiver.silent_peers() if self._receiver is not None else [],
            paths=self._acquaintances.paths() if self._acquaintances is not None else [],
            num_ranks=self.me.num_ranks,
        )

    def _report(self, report: Report) -> None:
        if self._join is not None:
            self._join.report(report)
