"""One hand-off that an instance sends, from first word to last: what is known of it, and what it does on each event.

    Accept ──▶ compare ──▶ add_chunk, add_chunk ──▶ add_part from every lane ──▶ Landed
                 └─ differs: Refused                 give_up ──▶ quiet from every rank ──▶ Failed

Threads: none of its own; the sender's lock guards it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from core.handoff import Peer
from core.layout import KVLayout
from core.prompt import Prompt
from core.report import FromCache
from prefill.agreement import disagreement
from prefill.push import PushChunk, PushCommands, Pushed, PushTarget, whole
from prefill.reports import SendReports
from transport.handoff import Event, Sending, advance_sending, allows
from transport.messages import Accept, Cancelled, Failed, Landed, Message, Refused
from transport.ports import Ports
from transport.runs import Lane, lanes

MAX_WHY_CHARACTERS = 1000


@dataclass
class Means:
    """What all hand-offs of one sending instance speak and act with. commands: the worker's next orders."""

    me: Peer
    layout: KVLayout
    ports: Ports
    reports: SendReports
    commands: PushCommands = field(default_factory=PushCommands)


@dataclass
class Outgoing:
    """One hand-off as the prefill side sees it. lanes: which of our ranks write to which of the receiver's; parts: of
    those that have written everything; pushed: once all have."""

    id: str
    deadline_s: float
    means: Means
    state: Sending = Sending.NEW
    prompt: Prompt | None = None
    accept: Accept | None = None
    decode: Peer | None = None
    num_chunks: int = 0
    finished: bool = False
    why: str = ""
    lanes: list[Lane] = field(default_factory=list)
    parts: list[Pushed] = field(default_factory=list)
    pushed: Pushed | None = None
    quiet_ranks: set[int] = field(default_factory=set)
    from_cache: list[FromCache] = field(default_factory=list)
    moments: dict[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        to = self.decode.name if self.decode else "?"
        return f"<Outgoing {self.id} {self.state.value} to {to}>"

    # ---- what D says ----

    def accepted(self, sender: Peer, accept: Accept) -> None:
        """D has reserved blocks, and names them."""
        if self.accept is None:
            self.decode, self.accept = sender, accept
            self.moments["accepted"] = self.means.ports.clock.unix_s()
        if self.state is Sending.RELEASED:
            self.means.ports.send(sender, Refused(self.id, self.why or "the prefill side has ended this hand-off"))
        elif allows(self.state, Event.ACCEPT):
            self.move(Event.ACCEPT)
            self.means.ports.faults.reach("accepted")
            self.compare()
            self.means.ports.wake()

    def declined(self, why: str) -> None:
        """D needs nothing from us."""
        self.why = why[:MAX_WHY_CHARACTERS]
        if allows(self.state, Event.DECLINE):
            self.move(Event.DECLINE)

    def cancelled(self, sender: Peer, why: str) -> None:
        """D wants no more, and wants to know when nothing is written any more."""
        self.decode, why = sender, why[:MAX_WHY_CHARACTERS]
        if self.state is Sending.MOVING:
            self.give_up(Event.CANCEL, why)
        elif self.state is not Sending.STOPPING:
            if allows(self.state, Event.CANCEL):
                self.why = why
                self.move(Event.CANCEL)
            self._say(Cancelled(self.id))
        self.means.ports.wake()

    # ---- what we do ----

    def move(self, event: Event) -> None:
        """To the next state."""
        self.state = advance_sending(self.state, event)
        if self.state is Sending.RELEASED:
            self.means.reports.ended(self, event)

    def compare(self) -> None:
        """Once both sides have spoken: the prompts must be the same, token by token."""
        if self.state is not Sending.ACCEPTED or self.prompt is None or self.accept is None or self.decode is None:
            return
        me, layout = self.means.me, self.means.layout
        self.why = disagreement(me, layout, self.prompt, self.accept, self.decode)
        if not self.why:
            self.lanes = lanes(layout, me.num_ranks, self.decode.num_ranks)
            return
        self.move(Event.REFUSE)
        self._say(Refused(self.id, self.why))

    def refuse(self, sender: Peer, why: str, layout: KVLayout | None = None) -> None:
        """Answers an Accept that cannot be read. layout: ours, where it is what differs."""
        self.decode = sender
        if self.state is Sending.NEW:
            self.move(Event.DECLINE)
        elif allows(self.state, Event.REFUSE):
            self.move(Event.REFUSE)
        self._say(Refused(self.id, why, layout))

    def add_chunk(self, num_tokens: int, block_ids: list[int]) -> None:
        """A chunk is scheduled, after which `num_tokens` of the prompt are computed, in these blocks."""
        accept = self.accept
        if self.state is not Sending.MOVING or accept is None or self.decode is None:
            return
        for lane in self.lanes:
            target = PushTarget(
                self.decode,
                accept.schemes[lane.receiver],
                accept.first_block,
                accept.num_tokens,
                accept.block_ids,
                accept.full_digest,
                lane,
            )
            self.means.commands.chunks.append(PushChunk(self.id, target, num_tokens, block_ids, self.num_chunks))
        self.num_chunks += 1

    def add_part(self, part: Pushed) -> None:
        """One pair of ranks is done; with the last one, so is the hand-off."""
        if not allows(self.state, Event.PUSHED):
            return
        self.parts.append(part)
        if len(self.parts) < len(self.lanes):
            return
        self.pushed = whole(self.parts)
        stopping = self.state is Sending.STOPPING
        self.move(Event.PUSHED)
        if stopping or self.decode is None or self.accept is None:
            self._say(Failed(self.id, self.why))
        else:
            self._landed(self.pushed, self.accept.num_tokens)

    def give_up(self, event: Event, why: str) -> None:
        """No further write starts."""
        self.why = why
        self.move(event)
        if self.state is Sending.STOPPING:
            self.means.commands.stop.append(self.id)
        elif self.state is Sending.RELEASED and event is not Event.PEER_LOST:
            self._say(Refused(self.id, why))
        self.means.ports.wake()

    def quiet(self, rank: int) -> None:
        """One of our ranks writes no more."""
        if self.state is not Sending.STOPPING:
            return
        self.quiet_ranks.add(rank)
        if len(self.quiet_ranks) == self.means.me.num_ranks:
            self.move(Event.QUIET)
            self._say(Failed(self.id, self.why))

    def may_go(self) -> bool:
        """Whether the engine has done with it, and nothing reads its blocks."""
        if self.finished and self.state is Sending.LANDED:
            self.move(Event.FINISH)
        return self.finished and self.state is Sending.RELEASED

    def _landed(self, pushed: Pushed, num_tokens: int) -> None:
        self.moments["moving"] = pushed.moving_unix_s
        self.moments["last_layer"] = pushed.last_layer_unix_s
        self.moments["computed"] = pushed.computed_unix_s
        self._say(
            Landed(
                handoff=self.id,
                num_tokens=num_tokens,
                num_bytes=pushed.num_bytes,
                parts=[part.part() for part in self.parts],
                moving_unix_s=pushed.moving_unix_s,
                last_layer_unix_s=pushed.last_layer_unix_s,
            )
        )
        self.moments["landed"] = self.means.ports.clock.unix_s()
        self.means.reports.sent(self)
        self.means.ports.faults.reach("landed")

    def _say(self, message: Message) -> None:
        if self.decode is not None:
            self.means.ports.send(self.decode, message)
