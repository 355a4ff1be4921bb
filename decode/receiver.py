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
from dataclasses import dataclass

from core.handoff import Peer
from core.layout import KVLayout
from core.prompt import Prompt
from decode.accounts import Account, Accounts
from decode.admission import Capacity, Limits, RecomputeBudget, fits
from decode.incoming import Incoming, IncomingTable
from decode.land import Arm, Check, Drop, LandCommands, LandResults, Lost, Received, together
from decode.peers import LostPeers
from transport.handoff import Event, Receiving, advance_receiving, allows
from transport.messages import Accept, Cancel, Cancelled, Decline, Failed, Landed, Message, Refused
from transport.ports import Ports
from transport.runs import lanes, objection


@dataclass(frozen=True)
class Offer:
    """What this instance offers to senders. schemes: by tensor-parallel rank. audit: fill blocks with a pattern before
    Accept and count afterwards."""

    layout: KVLayout
    schemes: list[list[tuple[str, bytes]]]
    full_digest: bool = False
    audit: bool = False


class Receiver:
    """All hand-offs that this instance receives."""

    def __init__(self, me: Peer, offer: Offer, ports: Ports, accounts: Accounts, limits: Limits) -> None:
        self._me = me
        self._offer = offer
        self._ports = ports
        self._accounts = accounts
        self._limits = limits
        self._block_size = offer.layout.block_size
        self._min_tokens = limits.min_tokens or self._block_size
        self._lock = threading.RLock()
        self._all = IncomingTable()
        self._lost_peers = LostPeers(ports.clock)
        self._budget = RecomputeBudget(limits.recomputes)
        self._commands = LandCommands()

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
                incoming = Incoming(prompt, prefill, deadline_s)
                self._all.add(incoming)
            if incoming.retried:
                return 0 if self._budget.take(incoming.prompt.request_id) else None
            if incoming.state is not Receiving.NEW:
                return 0
            missing = prompt.num_tokens - 1 - found_tokens
            if missing < self._min_tokens:
                self._decline(incoming, "cached" if found_tokens else "short")
                return 0
            if why := self._objection(prefill):
                return self._fall_back(incoming, why)
            if prefill.boot_id in self._lost_peers:
                return self._fall_back(incoming, "the prefill instance died")
            if self._ports.clock.monotonic_s() > incoming.deadline_s:
                return self._fall_back(incoming, "no room before the deadline")
            needed = self._num_blocks(prompt.num_tokens - 1, found_tokens)
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
                self._decline(incoming, "the engine does not read caches for this request")
                return
            incoming.found_tokens, incoming.cached_tokens, incoming.asked_tokens = (
                found_tokens,
                cached_tokens,
                num_tokens,
            )
            first = incoming.before_tokens // self._block_size
            wanted = block_ids[first : -(-(incoming.before_tokens + num_tokens) // self._block_size)]
            incoming.block_ids = tuple(wanted)
            incoming.accept = self._accept(incoming, first)
            self._move(incoming, Event.RESERVE)
            between = lanes(self._offer.layout, incoming.prefill.num_ranks, self._me.num_ranks)
            self._commands.arm.append(Arm(incoming.id, request_id, list(wanted), self._offer.audit, between))
            self._ports.faults.reach("reserved")
            if not self._offer.audit:
                self._send_accept(incoming)

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
                self._decline(incoming, "the request ended")
            elif allows(incoming.state, Event.CANCEL):
                self._revoke(incoming, Event.CANCEL, "the client is gone")
            if incoming.state is Receiving.RELEASED:
                self._all.forget(incoming)

    def take_commands(self) -> LandCommands:
        """The worker's orders for the step that is about to run."""
        with self._lock:
            commands, self._commands = self._commands, LandCommands()
            return commands

    def on_results(self, results: LandResults) -> None:
        """The worker's answer after a step; the engine has seen received and lost requests already."""
        with self._lock:
            for handoff, rank in results.armed:
                self._on_armed(handoff, rank)
            for ended in results.ended():
                self._on_ended(ended)

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
                self._on_landed(incoming, message)
            elif isinstance(message, Refused):
                why = self._explain(message)
                if allows(incoming.state, Event.REFUSE):
                    self._end(incoming, Event.REFUSE, why)
            elif isinstance(message, Failed) and allows(incoming.state, Event.ABORT):
                self._end(incoming, Event.ABORT, message.why)
            elif isinstance(message, Cancelled) and allows(incoming.state, Event.CANCELLED):
                self._end(incoming, Event.CANCELLED, "")
            self._ports.wake()

    def on_peer_lost(self, control: str) -> None:
        """The process behind this control address is gone; its worker may live a moment longer (the fence knows)."""
        with self._lock:
            for incoming in self._all:
                if incoming.prefill.control != control:
                    continue
                self._lost_peers.add(incoming.prefill.boot_id)
                if allows(incoming.state, Event.PEER_LOST):
                    self._revoke(incoming, Event.PEER_LOST, "the prefill instance died")
                elif incoming.state is Receiving.REVOKING:
                    drop = Drop(incoming.id, fenced=False, peer_dead=True, why=incoming.why)
                    self._commands.drop.append(drop)
            self._ports.wake()

    def tick(self) -> None:
        """Gives up hand-offs that are past their deadline."""
        now_s = self._ports.clock.monotonic_s()
        with self._lock:
            for incoming in self._all:
                if now_s <= incoming.deadline_s:
                    continue
                if allows(incoming.state, Event.DEADLINE):
                    self._revoke(incoming, Event.DEADLINE, "deadline")
                    self._ports.wake()
                elif incoming.state is Receiving.NEW and not incoming.retried:
                    self._ports.wake()

    # ---- inside the lock ----

    def _objection(self, prefill: Peer) -> str:
        """Why blocks cannot come from this peer's ranks; empty if they can."""
        why = objection(self._offer.layout, prefill.num_ranks, self._me.num_ranks)
        sizes = f"{self._me.name} has {self._me.num_ranks} ranks, {prefill.name} {prefill.num_ranks}"
        return f"tensor parallel sizes: {sizes}: {why}" if why else ""

    def _num_blocks(self, num_tokens: int, found_tokens: int) -> int:
        return -(-num_tokens // self._block_size) - found_tokens // self._block_size

    def _accept(self, incoming: Incoming, first_block: int) -> Accept:
        prompt = incoming.prompt
        return Accept(
            handoff=incoming.id,
            num_prompt_tokens=prompt.num_tokens,
            prompt_hash=prompt.hash,
            first_block=first_block,
            block_ids=list(incoming.block_ids),
            num_tokens=incoming.before_tokens + incoming.asked_tokens,
            schemes=self._offer.schemes,
            full_digest=self._offer.full_digest,
            timeout_s=max(incoming.deadline_s - self._ports.clock.monotonic_s(), 1.0),
            num_senders=incoming.prefill.num_ranks,
        )

    def _send_accept(self, incoming: Incoming) -> None:
        if incoming.accept is not None:
            self._account(incoming).moments["accepted"] = self._ports.clock.unix_s()
            self._ports.send(incoming.prefill, incoming.accept)

    def _account(self, incoming: Incoming) -> Account:
        return self._accounts.of(incoming.id)

    def _move(self, incoming: Incoming, event: Event) -> None:
        incoming.state = advance_receiving(incoming.state, event)

    def _decline(self, incoming: Incoming, why: str) -> None:
        account = self._account(incoming)
        account.outcome, account.why = "declined", why
        self._move(incoming, Event.DECLINE)
        self._ports.send(incoming.prefill, Decline(incoming.id, why))

    def _fall_back(self, incoming: Incoming, why: str) -> int | None:
        """Before any block was reserved: nothing to fence."""
        self._decline(incoming, why)
        return self._retry(incoming, why)

    def _retry(self, incoming: Incoming, why: str) -> int | None:
        incoming.retried = True
        account = self._account(incoming)
        account.outcome, account.why = "fell_back", why
        self._accounts.publish(incoming.id)
        return 0 if self._budget.take(incoming.prompt.request_id) else None

    def _on_landed(self, incoming: Incoming, landed: Landed) -> None:
        if incoming.state is Receiving.REVOKING:
            self._end(incoming, Event.LANDED, "")
        elif allows(incoming.state, Event.LANDED):
            self._move(incoming, Event.LANDED)
            account = self._account(incoming)
            account.transport = "+".join(sorted({part.scheme for part in landed.parts}))
            account.moments["moving"] = landed.moving_unix_s
            account.moments["last_layer"] = landed.last_layer_unix_s
            self._ports.faults.reach("checking")
            self._commands.check.append(Check(incoming.id, landed.parts, self._offer.full_digest))

    def _explain(self, refused: Refused) -> str:
        if refused.layout is None:
            return refused.why
        return f"{refused.why}: {self._offer.layout.differences(refused.layout)}"

    def _revoke(self, incoming: Incoming, event: Event, why: str) -> None:
        """Give up while P may still write: ask it to stop, and let the worker watch the fence."""
        self._move(incoming, event)
        incoming.revoked_s = self._ports.clock.monotonic_s()
        incoming.why = why
        is_dead = event is Event.PEER_LOST
        self._commands.drop.append(Drop(incoming.id, fenced=False, peer_dead=is_dead, why=why))
        self._ports.send(incoming.prefill, Cancel(incoming.id, why))  # one that lives after all stops, and says so

    def _end(self, incoming: Incoming, event: Event, why: str) -> None:
        """No write can follow any more."""
        self._move(incoming, event)
        self._commands.drop.append(Drop(incoming.id, fenced=True, why=why))

    def _on_armed(self, handoff: str, rank: int) -> None:
        incoming = self._all.get(handoff)
        if incoming is None:
            return
        incoming.armed_ranks.add(rank)
        is_ready = len(incoming.armed_ranks) == self._me.num_ranks
        if is_ready and self._offer.audit and incoming.state is Receiving.RESERVED:
            self._send_accept(incoming)

    def _on_ended(self, ended: Received | Lost) -> None:
        """On one rank; the engine, too, waits for the last."""
        incoming = self._all.get(ended.handoff)
        if incoming is None:
            return
        incoming.ended[ended.rank] = ended
        if len(incoming.ended) < self._me.num_ranks:
            return
        outcome = together(list(incoming.ended.values()))
        if isinstance(outcome, Received):
            self._on_received(incoming, outcome)
        else:
            self._on_lost(incoming, outcome.why)

    def _on_received(self, incoming: Incoming, received: Received) -> None:
        self._move(incoming, Event.GOOD)
        full_tokens = received.num_pairs // self._offer.layout.num_layers * self._block_size
        handed_over = min(full_tokens, incoming.asked_tokens)
        self._accounts.received(received, incoming.prompt.num_tokens, incoming.found_tokens, handed_over)
        self._account(incoming).moments["landed"] = self._ports.clock.unix_s()
        self._release(incoming)

    def _on_lost(self, incoming: Incoming, why: str) -> None:
        if incoming.state is Receiving.CHECKING:
            self._move(incoming, Event.BAD)
        elif incoming.state is Receiving.REVOKING:
            self._move(incoming, Event.FENCED)
        account = self._account(incoming)
        account.outcome, account.why = ("cancelled" if incoming.client_gone else "fell_back"), why
        incoming.retried = True
        self._release(incoming)
        self._accounts.publish(incoming.id)  # at once: the proxy then knows that this side has taken over

    def _release(self, incoming: Incoming) -> None:
        self._move(incoming, Event.REPORTED)
        incoming.block_ids = ()
        if incoming.client_gone:
            self._all.forget(incoming)
