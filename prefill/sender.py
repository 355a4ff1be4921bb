"""The sending scheduler: which requests may start, what is pushed to whom, and when blocks may be given back.

    engine ── admit ───▶ WAIT until D's Accept fits ──▶ PUSH ──▶ chunk, chunk, chunk ──▶ finished ──▶ blocks back
    D ─────── Accept ──▶                              Landed ◀── worker: pushed ◀───────┘

P takes no block for a request before D's Accept, so a full D keeps the request queued on both sides, unpinned. Blocks
of a request that ended while a write is in flight are held (the lease) until the worker says pushed or quiet.

Threads: the engine's thread calls everything except `on_message`, `on_peer_lost` and `tick`, which the control
plane's thread calls; one lock guards all. Nothing here waits.
"""

from __future__ import annotations

import enum
import threading

from core.handoff import Peer
from core.layout import KVLayout
from core.prompt import Prompt
from core.report import FromCache
from prefill.outgoing import Means
from prefill.outgoing_table import OutgoingTable
from prefill.push import PushCommands, PushResults
from prefill.reports import SendReports
from transport.handoff import Event, Sending, allows
from transport.messages import Accept, Cancel, Decline, Message
from transport.ports import Ports


class Gate(enum.Enum):
    """What the engine may do with a request now."""

    WAIT = "wait"
    PUSH = "push"
    COMPUTE = "compute"  # without pushing: the hand-off is over


class Sender:
    """All hand-offs that this instance sends. `me` is this instance, `layout` its KV layout."""

    def __init__(self, me: Peer, layout: KVLayout, ports: Ports, timeout_s: float = 60.0) -> None:
        self._ports = ports
        self._lock = threading.RLock()
        self._means = Means(me, layout, ports, SendReports(me.name, ports.report))
        self._all = OutgoingTable(self._means, timeout_s)

    # ---- the engine's thread ----

    def admit(self, prompt: Prompt) -> Gate:
        """Whether the engine may schedule this request now. May be asked again and again."""
        self._ports.faults.reach("asked")
        with self._lock:
            out = self._all.of(prompt.handoff.id, prompt.handoff.timeout_s)
            if out.prompt is None:
                self._all.bind(out, prompt)
            if out.state in (Sending.NEW, Sending.OFFERED):
                out.move(Event.ASK)
                out.compare()
            if out.state in (Sending.ACCEPTED, Sending.MOVING, Sending.LANDED):
                return Gate.PUSH
            overdue = self._ports.clock.monotonic_s() > out.deadline_s
            return Gate.COMPUTE if overdue else Gate.WAIT

    def started(self, request_id: str) -> None:
        """The engine has allocated blocks for the request."""
        with self._lock:
            out = self._all.of_request(request_id)
            if out is not None and allows(out.state, Event.START):
                out.move(Event.START)

    def loaded(self, request_id: str, parts: list[FromCache]) -> None:
        """The KV cache gave a part of the prompt, which is pushed as if it had been computed."""
        with self._lock:
            out = self._all.of_request(request_id)
            if out is not None:
                out.from_cache += parts

    def chunk(self, request_id: str, num_tokens: int, block_ids: list[int]) -> None:
        """A chunk is scheduled, after which `num_tokens` of the prompt are computed, in these blocks."""
        with self._lock:
            out = self._all.of_request(request_id)
            if out is not None:
                out.add_chunk(num_tokens, block_ids)

    def preempted(self, request_id: str) -> None:
        """The engine took the request's blocks away; a write may still be reading them, so the hand-off ends.

        The receiver finds a torn block by its digest, whatever was in flight.
        """
        with self._lock:
            out = self._all.of_request(request_id)
            if out is not None and out.state is Sending.MOVING:
                out.give_up(Event.ABORT, "preempted on the prefill side")

    def finished(self, request_id: str, *, completed: bool) -> bool:
        """The engine is done with the request. True: keep its blocks until `on_results` names it."""
        with self._lock:
            out = self._all.of_request(request_id)
            if out is None:
                return False
            out.finished = True
            if not completed and allows(out.state, Event.ABORT):
                out.give_up(Event.ABORT, "the request was aborted on the prefill side")
            if out.state is Sending.LANDED:
                out.move(Event.FINISH)
            if out.state in (Sending.MOVING, Sending.STOPPING):
                return True
            self._all.unbind(out)
            return False

    def take_commands(self) -> PushCommands:
        """The worker's orders for the step that is about to run."""
        with self._lock:
            commands, self._means.commands = self._means.commands, PushCommands()
            return commands

    def on_results(self, results: PushResults) -> list[str]:
        """The worker's answer after a step. Returns engine requests whose blocks may be given back."""
        with self._lock:
            for failure in results.failed:
                out = self._all.get(failure.handoff)
                if out is not None and out.state is Sending.MOVING:
                    out.give_up(Event.ABORT, failure.why)
            for pushed in results.pushed:
                if out := self._all.get(pushed.handoff):
                    out.add_part(pushed)
            for quiet in results.quiet:
                if out := self._all.get(quiet.handoff):
                    out.quiet(quiet.rank)
            return [self._all.unbind(out) for out in self._all.bound() if out.may_go()]

    def num_early_bytes(self) -> int:
        """Of Accepts whose requests have not come."""
        with self._lock:
            return self._all.num_early_bytes()

    def num_busy(self) -> int:
        """Hand-offs that are moving or stopping."""
        with self._lock:
            return sum(1 for out in self._all.bound() if out.state in (Sending.MOVING, Sending.STOPPING))

    # ---- the control plane's thread ----

    def on_message(self, sender: Peer, message: Message) -> None:
        """One message of a decode instance."""
        with self._lock:
            if isinstance(message, Accept):
                out = self._all.of(message.handoff, message.timeout_s)
                if out.accept is None and not self._all.has_room(out, message):
                    out.refuse(sender, "too much is accepted here before it was asked for")
                else:
                    out.accepted(sender, message)
            elif isinstance(message, Decline):
                self._all.of(message.handoff).declined(message.why)
            elif isinstance(message, Cancel):
                self._all.of(message.handoff).cancelled(sender, message.why)

    def refuse(self, sender: Peer, handoff: str, why: str, *, with_layout: bool = False) -> None:
        """Answers an Accept that cannot be read: another layout or protocol."""
        with self._lock:
            self._all.of(handoff).refuse(sender, why, self._means.layout if with_layout else None)

    def on_peer_lost(self, control: str) -> None:
        """The process behind this control address is gone."""
        with self._lock:
            boot_ids = set()
            for out in self._all:
                if out.decode is None or out.decode.control != control:
                    continue
                boot_ids.add(out.decode.boot_id)  # also of ended hand-offs: its memory may still be mapped
                if allows(out.state, Event.PEER_LOST):
                    out.give_up(Event.PEER_LOST, "the decode instance died")
            self._means.commands.forget.extend(boot_ids)

    def tick(self) -> None:
        """Ends hand-offs that are past their deadline."""
        now_s = self._ports.clock.monotonic_s()
        with self._lock:
            for out in self._all:
                if now_s > out.deadline_s and allows(out.state, Event.DEADLINE):
                    out.give_up(Event.DEADLINE, "deadline")
