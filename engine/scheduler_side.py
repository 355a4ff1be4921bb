"""The connector's half that lives beside vLLM's scheduler: turns its hooks into words of `prefill/` and `decode/`.

Threads: vLLM's engine core calls every hook from one thread; the control plane's thread delivers messages, lost
peers and ticks; the join thread asks for `info`. The senders' and receivers' own locks keep them apart; the tables
of this file belong to the engine's thread alone.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger

from core.clock import SystemClock
from core.errors import ProtocolError
from core.handoff import Handoff, Peer, handoff_from_params
from core.layout import PROTOCOL_VERSION, KVLayout
from core.prompt import Prompt
from core.report import Report
from core.topology import InstanceInfo
from decode.accounts import Accounts
from decode.admission import Capacity
from decode.receiver import Offer, Receiver
from engine.arrivals import Arrived
from engine.cache_side import CacheScheduler, by_tier, refuse_hash
from engine.internals import IdleSleep, prompt_of
from engine.settings import ConnectorSettings
from engine.steps import Handshake, StepOrders, StepResults
from kvcache.orders import CacheOrders
from prefill.sender import Gate, Sender
from transport.control import Callbacks, ControlPlane, Identity
from transport.faultpoint import FaultPoint
from transport.join import JoinThread
from transport.messages import Accept, Cancel, Decline, Envelope, Message, Refused, decode_body
from transport.ports import Ports

IDLE_SLEEP_S = 0.1
"""Longest sleep of an engine that only waits; deadlines are watched by the control plane's thread."""

GROWTH_BLOCKS = 4
"""Blocks that a running request is assumed to need soon, at most: head-room that hand-offs may not take."""

_log = init_logger("vllm.baton")


class SchedulerSide:
    """One instance's hand-off scheduling."""

    def __init__(
        self, settings: ConnectorSettings, layout: KVLayout, num_blocks: int, hash_algorithm: str = "sha256"
    ) -> None:
        self._settings = settings
        self._layout = layout
        self._fingerprint = layout.fingerprint()
        self._num_blocks = num_blocks
        self._sleep = IdleSleep()
        self._free_blocks: Callable[[], int] = lambda: 0
        self._requests: dict[str, Any] = {}
        self._prompts: dict[str, Prompt] = {}
        self._tickets: dict[str, Handoff | None] = {}
        self._found: dict[str, int] = {}
        self._cached: dict[str, int] = {}
        self._num_watched = 0
        self._begun_s = 0.0
        self._num_prompt_tokens = 0
        self._num_gated = 0
        self._schemes: list[tuple[str, bytes]] = []
        self._join: JoinThread | None = None
        self._receiver: Receiver | None = None  # until `start`; callbacks may come before that
        identity = Identity(settings.name, uuid.uuid4().hex, self._fingerprint)
        callbacks = Callbacks(self._on_envelope, self._on_peer_lost, self._on_tick)
        self._control = ControlPlane(settings.host, identity, callbacks)
        self.me = self._control.peer
        self._ports = Ports(
            send=self._send,
            wake=self._sleep.wake,
            report=self._report,
            clock=SystemClock(),
            faults=FaultPoint(settings.fault),
        )
        self._sender = Sender(self.me, layout, self._ports)
        self._accounts = Accounts(settings.name, self._report)
        self._cache: CacheScheduler | None = None
        if settings.cache:
            refuse_hash(hash_algorithm)
            self._cache = CacheScheduler(settings, layout, self.me.boot_id, hash_algorithm, self._sleep.wake)

    # ---- start and end ----

    def start(self, handshake: Handshake) -> None:
        """The worker's memory is known: receive, and tell the proxy that this instance exists."""
        settings = self._settings
        self._schemes = handshake.schemes
        offer = Offer(self._layout, handshake.schemes, settings.full_digest, settings.audit)
        self._receiver = Receiver(self.me, offer, self._ports, self._accounts, settings.limits)
        if settings.join:
            self._join = JoinThread(settings.join, self._info)
        names = ", ".join(scheme for scheme, _ in handshake.schemes)
        _log.info(
            "baton instance %s (%s): control %s, transports %s",
            self.me.name,
            settings.role.value,
            self.me.control,
            names,
        )

    def watch_pool(self, free_blocks: Callable[[], int]) -> None:
        """How to ask the engine's block pool for its free blocks."""
        self._free_blocks = free_blocks

    def close(self) -> None:
        """Says good-bye to the proxy and ends the threads."""
        if self._join is not None:
            self._join.close()
        self._control.close()
        if self._cache is not None:
            self._cache.close()

    # ---- hooks, in the order of one step ----

    def arrived(self, request: Any) -> None:
        """A request is new. One that P computes for us is looked for in the cache, but not stored by us."""
        if self._cache is not None:
            handoff = self._ticket(request)
            awaits_peer = handoff is not None and handoff.prefill is not None and not self._is_sender(handoff)
            self._cache.arrived(request, computes=not awaits_peer)

    def num_tokens_from_outside(self, request: Any, found_tokens: int) -> int | None:
        """Tokens to take, after those found locally, from the cache and then from P; None: ask again in the next
        step."""
        num_tokens = self._plan(request, found_tokens)
        self._num_gated += num_tokens is None
        return num_tokens

    def allocated(self, request: Any, block_ids: list[int], num_tokens: int) -> None:
        """The engine has allocated blocks; num_tokens of the prompt are to come from outside."""
        request_id = request.request_id
        self._requests[request_id] = request
        found = self._found.get(request_id, 0)
        cached = min(self._cached.pop(request_id, 0), num_tokens)
        if self._cache is not None:
            self._cache.allocated(request_id, block_ids, found, cached)
        handoff = self._ticket(request)
        if handoff is None or self._receiver is None:
            return
        if self._is_sender(handoff):
            self._sender.started(request_id)
            return
        self._receiver.reserve(request_id, block_ids, num_tokens - cached, found, cached)
        if num_tokens == 0:
            self._receiver.found(request_id, handoff.id, request.num_prompt_tokens, found)

    def orders(self, scheduled: Any) -> StepOrders:
        """The worker's orders for the step that vLLM has just scheduled (a `SchedulerOutput`)."""
        self._idle(scheduled)
        self._begun_s = self._ports.clock.monotonic_s()
        self._num_prompt_tokens = 0
        for request_id in scheduled.preempted_req_ids or ():
            self._sender.preempted(request_id)
        for request_id, num_new in scheduled.num_scheduled_tokens.items():
            self._note_chunk(scheduled, request_id, num_new)
        if self._receiver is None:
            return StepOrders()
        cache = self._cache.orders() if self._cache is not None else CacheOrders()
        return StepOrders(self._sender.take_commands(), self._receiver.take_commands(), cache)

    def results(self, results: StepResults) -> set[str]:
        """The worker's answer. Returns engine requests whose blocks no transfer reads any more."""
        self._num_watched = results.num_watched
        if self._cache is not None:
            self._cache.computed(self._num_prompt_tokens, self._ports.clock.monotonic_s() - self._begun_s)
        if self._receiver is not None:
            self._receiver.on_results(results.land)
        if self._cache is not None:
            self._cache.results(results.cache)
            for arrived in results.arrived:
                self._note_arrived(arrived)
        return set(self._sender.on_results(results.push))

    def finished(self, request: Any, *, completed: bool) -> bool:
        """The engine is done with a request. True: keep its blocks until `results` names it."""
        request_id = request.request_id
        handoff = self._ticket(request)
        tables: tuple[dict[str, Any], ...] = (
            self._requests,
            self._prompts,
            self._tickets,
            self._found,
            self._cached,
        )
        for table in tables:
            table.pop(request_id, None)
        if self._cache is not None:
            self._cache.finished(request_id)
        if handoff is None or self._receiver is None:
            return False
        if self._is_sender(handoff):
            return self._sender.finished(request_id, completed=completed)
        self._receiver.finished(request_id)
        return False

    # ---- inside ----

    def _is_sender(self, handoff: Handoff) -> bool:
        return handoff.prefill is not None and handoff.prefill.boot_id == self.me.boot_id

    def _plan(self, request: Any, found_tokens: int) -> int | None:
        """[own prefix cache][the host's cache][P], in prefix order."""
        request_id = request.request_id
        self._found[request_id] = found_tokens
        handoff = self._ticket(request)
        cached: int | None = 0
        if self._cache is not None:
            cached = self._cache.look_up(request, found_tokens)
        if handoff is not None and self._receiver is not None and self._is_sender(handoff):
            gate = self._sender.admit(self._prompt(request, handoff))
            cached = None if gate is Gate.WAIT else cached
        if cached is None:
            return None
        self._cached[request_id] = cached
        if handoff is None or self._receiver is None or handoff.decode.boot_id != self.me.boot_id:
            return cached
        from_peer = self._receiver.look_up(self._prompt(request, handoff), found_tokens + cached, self._capacity)
        return None if from_peer is None else cached + from_peer

    def _note_arrived(self, arrived: Arrived) -> None:
        """What the cache gave one request, for its record."""
        request = self._requests.get(arrived.request_id)
        handoff = self._tickets.get(arrived.request_id)
        if request is None or handoff is None or self._receiver is None or arrived.loaded is None:
            return
        found = self._found.get(arrived.request_id, 0)
        parts = by_tier(arrived.loaded, self._layout.block_size, request.num_prompt_tokens - 1 - found)
        if self._is_sender(handoff):
            if not arrived.why_lost:
                self._sender.loaded(arrived.request_id, parts)
        elif arrived.why_lost:
            self._receiver.load_lost(arrived.request_id, handoff.id, arrived.why_lost)
        else:
            self._receiver.loaded(arrived.request_id, handoff.id, parts, request.num_prompt_tokens, found)

    def _ticket(self, request: Any) -> Handoff | None:
        if request.request_id in self._tickets:
            return self._tickets[request.request_id]
        try:
            handoff = handoff_from_params(request.kv_transfer_params)
        except ProtocolError as error:
            _log.warning("request %s: %s; computed locally", request.request_id, error)
            handoff = None
        self._tickets[request.request_id] = handoff
        return handoff

    def _prompt(self, request: Any, handoff: Handoff) -> Prompt:
        prompt = self._prompts.get(request.request_id)
        if prompt is None:
            prompt = self._prompts[request.request_id] = prompt_of(request, handoff)
        return prompt

    def _note_chunk(self, scheduled: Any, request_id: str, num_new: int) -> None:
        request = self._requests.get(request_id)
        if request is None or self._receiver is None:
            return
        done_before, num_prompt = request.num_computed_tokens, request.num_prompt_tokens
        self._num_prompt_tokens += max(min(num_new, num_prompt - done_before), 0)

        def block_ids() -> list[int]:
            return list(scheduled.kv_connector_block_state.resolve_block_ids(request_id)[0])

        if self._cache is not None:
            self._cache.scheduled(request, done_before + num_new, block_ids)
        handoff = self._tickets.get(request_id)
        if handoff is None or done_before >= num_prompt:
            return
        if self._is_sender(handoff):
            self._sender.chunk(request_id, min(done_before + num_new, num_prompt), block_ids())
        else:
            self._receiver.scheduled(request_id, handoff.id, done_before, num_new, num_prompt)

    def _idle(self, scheduled: Any) -> None:
        """Sleeps while there is nothing to compute and only a message or a new request can change that."""
        num_gated, self._num_gated = self._num_gated, 0
        if scheduled.total_num_scheduled_tokens or scheduled.finished_req_ids or self._num_watched:
            return
        waits = num_gated or (self._receiver is not None and self._receiver.num_waiting())
        if waits and not self._sender.num_busy():
            self._sleep.sleep(IDLE_SLEEP_S)

    def _capacity(self) -> Capacity:
        block_size = self._layout.block_size
        growth = 0
        for request in self._requests.values():
            end_tokens = request.num_prompt_tokens + request.max_tokens
            left = -(-end_tokens // block_size) - -(-request.num_tokens // block_size)
            growth += max(0, min(left, GROWTH_BLOCKS))
        return Capacity(self._num_blocks, self._free_blocks(), growth)

    def _info(self) -> InstanceInfo:
        return InstanceInfo(
            name=self.me.name,
            role=self._settings.role,
            url=self._settings.url,
            boot_id=self.me.boot_id,
            control=self.me.control,
            fingerprint=self._fingerprint,
            transports=[scheme for scheme, _ in self._schemes],
            block_size=self._layout.block_size,
            num_blocks=self._num_blocks,
            free_blocks=self._free_blocks(),
            pid=os.getpid(),
            silent_peers=self._receiver.silent_peers() if self._receiver is not None else [],
        )

    def _report(self, report: Report) -> None:
        if self._join is not None:
            self._join.report(report)

    def _send(self, peer: Peer, message: Message) -> bool:
        try:
            return self._control.send(peer, message)
        except ProtocolError as error:
            _log.warning("%s", error)
            return False

    def _on_envelope(self, envelope: Envelope) -> None:
        if self._receiver is None:  # nobody knows of us yet
            return
        if envelope.protocol == PROTOCOL_VERSION and envelope.fingerprint == self._fingerprint:
            message = decode_body(envelope)
            if isinstance(message, Accept | Decline | Cancel):
                self._sender.on_message(envelope.sender, message)
            else:
                self._receiver.on_message(envelope.sender, message)
            return
        self._on_stranger(envelope)

    def _on_stranger(self, envelope: Envelope) -> None:
        """A peer with another layout or protocol: the asking side is refused, and told why with both sides' values."""
        try:
            message = decode_body(envelope)
        except ProtocolError:
            message = None
        if isinstance(message, Refused):
            if self._receiver is not None:
                self._receiver.on_message(envelope.sender, message)
        elif message is None or isinstance(message, Accept):
            why = f"{self.me.name} speaks protocol {PROTOCOL_VERSION}, {envelope.sender.name} {envelope.protocol}"
            same = envelope.protocol == PROTOCOL_VERSION
            why = f"KV layouts of {self.me.name} and {envelope.sender.name} differ" if same else why
            self._sender.refuse(envelope.sender, envelope.handoff, why, with_layout=same)

    def _on_peer_lost(self, control: str) -> None:
        if self._receiver is not None:
            self._sender.on_peer_lost(control)
            self._receiver.on_peer_lost(control)

    def _on_tick(self) -> None:
        if self._receiver is not None:
            self._sender.tick()
            self._receiver.tick()
