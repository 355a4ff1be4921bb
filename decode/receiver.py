"""The receiving scheduler: what to ask from P, when it counts as received, and when to compute instead.

    engine ── look_up ──▶ 0: compute here   n: ask P for n tokens   None: ask me again
           ── reserve ──▶ Accept ─────────▶ P ... Landed ◀── P
           ◀── received / lost ── worker: counted, compared        lost: the engine computes the prompt itself

A request whose hand-off failed is computed here, at most `limits.recomputes` of them at a time; the others wait
without blocks. Blocks go back to the engine only behind the fence (transport/handoff.py).

Threads: the engine's thread calls everything except `on_message`, `on_peer_lost` and `tick`, which the control
plane's thread calls; one lock guards all. Nothing here waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from core.handoff import Peer
from core.prompt import Prompt
from decode.accounts import Accounts
from decode.admission import Capacity, Limits, RecomputeBudget, fits
from decode.incoming import Incoming, Means, Offer, rank_objection
from decode.incoming_table import IncomingTable
from decode.land import LandCommands, LandResults
from decode.peers import LostPeers
from transport.handoff import Event, Receiving, allows
from transport.messages import Cancelled, Failed, Landed, Message, Refused
from transport.ports import Ports


class Receiver:
    """All hand-offs that this instance receives."""

    def __init__(self, me: Peer, offer: Offer, ports: Ports, accounts: Accounts, limits: Limits) -> None:
        self._ports = ports
        self._accounts = accounts
        self._limits = limits
        self._block_size = offer.layout.block_size
        self._min_tokens = limits.min_tokens or self._block_size
        self._lock = threading.RLock()
        self._all = IncomingTable()
        self._lost_peers = LostPeers(ports.clock)
        self._budget = RecomputeBudget(limits.recomputes)
        self._means = Means(me, offer, ports, accounts, self._budget)

    # ---- the engine's thread ----

    def look_up(self, prompt: Prompt, found_tokens: int, capacity: Callable[[], Capacity]) -> int | None:
        """How many tokens, after `found_tokens` of its own cache, to ask from P. None: not now. May be repeated."""
        prefill = prompt.handoff.prefill
        if prefill is None:
            return 0
        with self._lock:
            incoming = self._all.of_request(prompt.request_id)
            if incoming is None:
                deadline_s = self._ports.clock.monotonic_s() + prompt.handoff.timeout_s
                incoming = Incoming(prompt, prefill, deadline_s, self._means)
                self._all.add(incoming)
            if incoming.retried:
                return 0 if self._budget.take(prompt.request_id) else None
            if incoming.state is not Receiving.NEW:
                return 0
            missing = prompt.num_tokens - 1 - found_tokens
            if missing < self._min_tokens:
                incoming.decline("cached" if found_tokens else "short")
                return 0
            why = rank_objection(self._means.me, prefill, self._means.offer.layout)
            if prefill.boot_id in self._lost_peers:
                why = why or "the prefill instance died"
            if self._ports.clock.monotonic_s() > incoming.deadline_s:
                why = why or "no room before the deadline"
            if why:
                return 0 if incoming.fall_back(why) else None
            needed = -(-(prompt.num_tokens - 1) // self._block_size) - found_tokens // self._block_size
            if not fits(capacity(), self._limits, self._all.reserved_blocks(), needed):
                return None
            return missing

    def reserve(
        self, request_id: str, block_ids: list[int], num_tokens: int, found_tokens: int, cached_tokens: int = 0
    ) -> None:
        """The engine has allocated all blocks of the request; behind those that it found and those that the KV cache
        gives, `num_tokens` are to come from P."""
        with self._lock:
            incoming = self._all.of_request(request_id)
            if incoming is None or incoming.state is not Receiving.NEW or incoming.retried:
                return
            if num_tokens <= 0:
                incoming.decline("the engine does not read caches for this request")
            else:
                incoming.reserve(block_ids, num_tokens, found_tokens, cached_tokens)

    def scheduled(self, request_id: str, handoff: str, done_before: int, num_new: int, num_prompt: int) -> None:
        """The engine computes prompt tokens [done_before, done_before + num_new) of a request in this step."""
        num_prompt_new = min(num_new, num_prompt - done_before)
        if num_prompt_new <= 0:
            return
        with self._lock:
            account = self._accounts.of(handoff)
            account.computed += num_prompt_new
            if done_before + num_new >= num_prompt:
                self._budget.give_back(request_id)
                self._accounts.publish(handoff)

    def load_lost(self, request_id: str, handoff: str, why: str) -> None:
        """The KV cache's part is not what it should be, so the engine computes everything."""
        with self._lock:
            incoming = self._all.of_request(request_id)
            if incoming is not None:
                incoming.retried = True
            self._accounts.lost(request_id, handoff, why)
            self._accounts.publish(handoff)

    def finished(self, request_id: str) -> None:
        """The engine is done with the request: completed, or its client is gone."""
        with self._lock:
            self._accounts.forget(request_id)
            self._budget.give_back(request_id)
            incoming = self._all.of_request(request_id)
            if incoming is None:
                return
            incoming.client_gone = True
            if incoming.state is Receiving.NEW:
                incoming.decline("the request ended")
            elif allows(incoming.state, Event.CANCEL):
                incoming.revoke(Event.CANCEL, "the client is gone")
            if incoming.state is Receiving.RELEASED:
                self._all.forget(incoming)

    def take_commands(self) -> LandCommands:
        """The worker's orders for the step that is about to run."""
        with self._lock:
            commands, self._means.commands = self._means.commands, LandCommands()
            return commands

    def on_results(self, results: LandResults) -> None:
        """The worker's answer after a step; the engine has seen received and lost requests already."""
        with self._lock:
            for handoff, rank in results.armed:
                if incoming := self._all.get(handoff):
                    incoming.armed(rank)
            for ended in results.ended():
                if incoming := self._all.get(ended.handoff):
                    incoming.ended(ended)
                    if incoming.state is Receiving.RELEASED and incoming.client_gone:
                        self._all.forget(incoming)

    def num_waiting(self) -> int:
        """Hand-offs with reserved blocks."""
        with self._lock:
            return self._all.num_waiting()

    def silent_peers(self) -> list[str]:
        """Boot ids of peers that may still write into our blocks and have not answered for SILENT_PEER_S."""
        with self._lock:
            return self._all.silent_peers(self._ports.clock.monotonic_s())

    # ---- the control plane's thread ----

    def on_message(self, sender: Peer, message: Message) -> None:
        """One message of a prefill instance."""
        with self._lock:
            incoming = self._all.get(message.handoff)
            if incoming is None or sender.boot_id != incoming.prefill.boot_id:
                return
            if isinstance(message, Landed):
                incoming.landed(message)
            elif isinstance(message, Refused):
                incoming.refused(message)
            elif isinstance(message, Failed) and allows(incoming.state, Event.ABORT):
                incoming.end(Event.ABORT, message.why)
            elif isinstance(message, Cancelled) and allows(incoming.state, Event.CANCELLED):
                incoming.end(Event.CANCELLED, "")
            self._ports.wake()

    def on_peer_lost(self, control: str) -> None:
        """The process behind this control address is gone; its worker may live a moment longer (the fence knows)."""
        with self._lock:
            for incoming in self._all:
                if incoming.prefill.control != control:
                    continue
                self._lost_peers.add(incoming.prefill.boot_id)
                if allows(incoming.state, Event.PEER_LOST):
                    incoming.revoke(Event.PEER_LOST, "the prefill instance died")
                elif incoming.state is Receiving.REVOKING:
                    incoming.drop(is_dead=True)
            self._ports.wake()

    def tick(self) -> None:
        """Gives up hand-offs that are past their deadline."""
        now_s = self._ports.clock.monotonic_s()
        with self._lock:
            for incoming in self._all:
                if now_s <= incoming.deadline_s:
                    continue
                if allows(incoming.state, Event.DEADLINE):
                    incoming.revoke(Event.DEADLINE, "deadline")
                    self._ports.wake()
                elif incoming.state is Receiving.NEW and not incoming.retried:
                    self._ports.wake()
