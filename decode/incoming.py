"""One hand-off that an instance receives, from first look to last: what is known of it, and what it does on each event.

    reserve ──▶ Accept ──▶ landed ──▶ checked by every rank ──▶ received
       decline: not asked for      revoke: P may still write ──▶ fenced ──▶ lost: the engine computes the prompt

Threads: none of its own; the receiver's lock guards it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from core.handoff import Peer
from core.layout import KVLayout
from core.prompt import Prompt
from decode.accounts import Account, Accounts
from decode.admission import RecomputeBudget
from decode.land import Arm, Check, Drop, LandCommands, Lost, Received, together
from transport.handoff import Event, Receiving, advance_receiving, allows
from transport.messages import Accept, Cancel, Decline, Landed, Refused
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


@dataclass
class Means:
    """What all hand-offs of one receiving instance speak and act with. commands: the worker's next orders."""

    me: Peer
    offer: Offer
    ports: Ports
    accounts: Accounts
    budget: RecomputeBudget
    commands: LandCommands = field(default_factory=LandCommands)


@dataclass
class Incoming:
    """One hand-off as the decode side sees it: tokens found in the engine's cache, then those of the KV cache's tiers,
    then those asked from P. `retried`: it failed, and the engine computes the prompt. outcomes: by our ranks."""

    prompt: Prompt
    prefill: Peer
    deadline_s: float
    means: Means
    state: Receiving = Receiving.NEW
    found_tokens: int = 0
    cached_tokens: int = 0
    asked_tokens: int = 0
    block_ids: tuple[int, ...] = ()
    retried: bool = False
    client_gone: bool = False
    accept: Accept | None = None
    armed_ranks: set[int] = field(default_factory=set)
    outcomes: dict[int, Received | Lost] = field(default_factory=dict)
    revoked_s: float = 0.0
    why: str = ""

    @property
    def id(self) -> str:
        return self.prompt.handoff.id

    @property
    def before_tokens(self) -> int:
        """Of the prompt, before the first that is asked from P."""
        return self.found_tokens + self.cached_tokens

    @property
    def account(self) -> Account:
        """What the proxy will be told of it."""
        return self.means.accounts.of(self.id)

    def __repr__(self) -> str:
        return f"<Incoming {self.id} {self.state.value} {len(self.block_ids)} blocks from {self.prefill.name}>"

    # ---- before any block is reserved ----

    def decline(self, why: str) -> None:
        """Nothing is needed from P."""
        self.account.outcome, self.account.why = "declined", why
        self._move(Event.DECLINE)
        self.means.ports.send(self.prefill, Decline(self.id, why))

    def fall_back(self, why: str) -> bool:
        """The engine computes the prompt: True if it may do so now. Nothing was reserved, so there is nothing to
        fence."""
        self.decline(why)
        self.retried = True
        self.account.outcome, self.account.why = "fell_back", why
        self.means.accounts.publish(self.id)
        return self.means.budget.take(self.prompt.request_id)

    # ---- while P may write ----

    def reserve(self, block_ids: list[int], num_tokens: int, found_tokens: int, cached_tokens: int) -> None:
        """These are the request's blocks; behind what is found and what the KV cache gives, num_tokens are P's."""
        offer, block_size = self.means.offer, self.means.offer.layout.block_size
        self.found_tokens, self.cached_tokens, self.asked_tokens = found_tokens, cached_tokens, num_tokens
        first = self.before_tokens // block_size
        self.block_ids = tuple(block_ids[first : -(-(self.before_tokens + num_tokens) // block_size)])
        self.accept = _accept_of(self, first)
        self._move(Event.RESERVE)
        between = lanes(offer.layout, self.prefill.num_ranks, self.means.me.num_ranks)
        arm = Arm(self.id, self.prompt.request_id, list(self.block_ids), offer.audit, between)
        self.means.commands.arm.append(arm)
        self.means.ports.faults.reach("reserved")
        if not offer.audit:
            self._send_accept()

    def armed(self, rank: int) -> None:
        """One of our ranks expects the writes."""
        self.armed_ranks.add(rank)
        is_ready = len(self.armed_ranks) == self.means.me.num_ranks
        if is_ready and self.means.offer.audit and self.state is Receiving.RESERVED:
            self._send_accept()

    def landed(self, landed: Landed) -> None:
        """P says that every byte is in place."""
        if self.state is Receiving.REVOKING:
            self.end(Event.LANDED, "")
        elif allows(self.state, Event.LANDED):
            self._move(Event.LANDED)
            account = self.account
            account.transport = "+".join(sorted({part.scheme for part in landed.parts}))
            account.moments["moving"] = landed.moving_unix_s
            account.moments["last_layer"] = landed.last_layer_unix_s
            self.means.ports.faults.reach("checking")
            self.means.commands.check.append(Check(self.id, landed.parts, self.means.offer.full_digest))

    def refused(self, refused: Refused) -> None:
        """P does not push."""
        why = refused.why
        if refused.layout is not None:
            why = f"{why}: {self.means.offer.layout.differences(refused.layout)}"
        if allows(self.state, Event.REFUSE):
            self.end(Event.REFUSE, why)

    def revoke(self, event: Event, why: str) -> None:
        """Give up while P may still write: ask it to stop, and let the worker watch the fence."""
        self._move(event)
        self.revoked_s = self.means.ports.clock.monotonic_s()
        self.why = why
        self.drop(is_dead=event is Event.PEER_LOST)
        self.means.ports.send(self.prefill, Cancel(self.id, why))  # one that lives after all stops, and says so

    def drop(self, *, is_dead: bool) -> None:
        """The worker watches the fence, and knows whether P is dead."""
        self.means.commands.drop.append(Drop(self.id, fenced=False, peer_dead=is_dead, why=self.why))

    def end(self, event: Event, why: str) -> None:
        """No write can follow any more."""
        self._move(event)
        self.means.commands.drop.append(Drop(self.id, fenced=True, why=why))

    # ---- when our workers have ended it ----

    def ended(self, outcome: Received | Lost) -> None:
        """On one rank; the engine, too, waits for the last."""
        self.outcomes[outcome.rank] = outcome
        if len(self.outcomes) < self.means.me.num_ranks:
            return
        whole = together(list(self.outcomes.values()))
        if isinstance(whole, Received):
            self._received(whole)
        else:
            self._lost(whole.why)

    def _received(self, received: Received) -> None:
        self._move(Event.GOOD)
        layout = self.means.offer.layout
        full_tokens = received.num_pairs // layout.num_layers * layout.block_size
        handed_over = min(full_tokens, self.asked_tokens)
        self.means.accounts.received(received, self.prompt.num_tokens, self.found_tokens, handed_over)
        self.account.moments["landed"] = self.means.ports.clock.unix_s()
        self._move(Event.REPORTED)
        self.block_ids = ()

    def _lost(self, why: str) -> None:
        if self.state is Receiving.CHECKING:
            self._move(Event.BAD)
        elif self.state is Receiving.REVOKING:
            self._move(Event.FENCED)
        self.account.outcome, self.account.why = ("cancelled" if self.client_gone else "fell_back"), why
        self.retried = True
        self._move(Event.REPORTED)
        self.block_ids = ()
        self.means.accounts.publish(self.id)  # at once: the proxy then knows that this side has taken over

    def _move(self, event: Event) -> None:
        self.state = advance_receiving(self.state, event)

    def _send_accept(self) -> None:
        if self.accept is not None:
            self.account.moments["accepted"] = self.means.ports.clock.unix_s()
            self.means.ports.send(self.prefill, self.accept)


def rank_objection(me: Peer, prefill: Peer, layout: KVLayout) -> str:
    """Why blocks cannot come from this peer's ranks; empty if they can."""
    why = objection(layout, prefill.num_ranks, me.num_ranks)
    sizes = f"{me.name} has {me.num_ranks} ranks, {prefill.name} {prefill.num_ranks}"
    return f"tensor parallel sizes: {sizes}: {why}" if why else ""


def _accept_of(incoming: Incoming, first_block: int) -> Accept:
    offer, now_s = incoming.means.offer, incoming.means.ports.clock.monotonic_s()
    return Accept(
        handoff=incoming.id,
        num_prompt_tokens=incoming.prompt.num_tokens,
        prompt_hash=incoming.prompt.hash,
        first_block=first_block,
        block_ids=list(incoming.block_ids),
        num_tokens=incoming.before_tokens + incoming.asked_tokens,
        schemes=offer.schemes,
        full_digest=offer.full_digest,
        timeout_s=max(incoming.deadline_s - now_s, 1.0),
        num_senders=incoming.prefill.num_ranks,
    )
