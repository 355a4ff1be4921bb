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
from prefill.outgoing import MAX_WHY_CHARACTERS, Outgoing, OutgoingTable
from prefill.push import PushChunk, PushCommands, Pushed, PushResults, PushTarget, Quiet
from prefill.reports import SendReports
from transport.handoff import Event, Sending, advance_sending, allows
from transport.messages import Accept, Cancel, Cancelled, Decline, Failed, Landed, Message, Refused
from transport.ports import Ports
from transport.runs import lanes, objection


class Gate(enum.Enum):
    """What the engine may do with a request now."""

    WAIT = "wait"
    PUSH = "push"
    COMPUTE = "compute"  # without pushing: the hand-off is over


class Sender:
    """All hand-offs that this instance sends. `me` is this instance, `layout` its KV layout."""

    def __init__(self, me: Peer, layout: KVLayout, ports: Ports, timeout_s: float = 60.0) -> None:
        self._me = me
        self._layout = layout
        self._ports = ports
        self._lock = threading.RLock()
        self._all = OutgoingTable(ports.clock, timeout_s)
        self._reports = SendReports(me.name, ports.report)
        self._commands = PushCommands()

    # ---- the engine's thread ----

    def admit(self, prompt: Prompt) -> Gate:
        """Whether the engine may schedule this request now. May be asked again and again."""
        self._ports.faults.reach("asked")
        with self._lock:
            out = self._all.of(prompt.handoff.id, prompt.handoff.timeout_s)
            if out.prompt is None:
                self._all.bind(out, prompt)
            if out.state in (Sending.NEW, Sending.OFFERED):
                self._move(out, Event.ASK)
                self._compare(out)
            if out.state in (Sending.ACCEPTED, Sending.MOVING, Sending.LANDED):
                return Gate.PUSH
            overdue = self._ports.clock.monotonic_s() > out.deadline_s
            return Gate.COMPUTE if overdue else Gate.WAIT

    def started(self, request_id: str) -> None:
        """The engine has allocated blocks for the request."""
        with self._lock:
            out = self._all.of_request(request_id)
            if out is not None and allows(out.state, Event.START):
                self._move(out, Event.START)

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
            if out is None or out.state is not Sending.MOVING or out.accept is None or out.decode is None:
                return
            accept = out.accept
            for lane in out.lanes:
                target = PushTarget(
                    out.decode,
                    accept.schemes[lane.receiver],
                    accept.first_block,
                    accept.num_tokens,
                    accept.block_ids,
                    accept.full_digest,
                    lane,
                )
                self._commands.chunks.append(PushChunk(out.id, target, num_tokens, block_ids, out.num_chunks))
            out.num_chunks += 1

    def preempted(self, request_id: str) -> None:
        """The engine took the request's blocks away; a write may still be reading them, so the hand-off ends.

        The receiver finds a torn block by its digest, whatever was in flight.
        """
        with self._lock:
            out = self._all.of_request(request_id)
            if out is not None and out.state is Sending.MOVING:
                self._give_up(out, Event.ABORT, "preempted on the prefill side")

    def finished(self, request_id: str, *, completed: bool) -> bool:
        """The engine is done with the request. True: keep its blocks until `on_results` names it."""
        with self._lock:
            out = self._all.of_request(request_id)
            if out is None:
                return False
            out.finished = True
            if not completed and allows(out.state, Event.ABORT):
                self._give_up(out, Event.ABORT, "the request was aborted on the prefill side")
            if out.state is Sending.LANDED:
                self._move(out, Event.FINISH)
            if out.state in (Sending.MOVING, Sending.STOPPING):
                return True
            self._all.unbind(out)
            return False

    def take_commands(self) -> PushCommands:
        """The worker's orders for the step that is about to run."""
        with self._lock:
            commands, self._commands = self._commands, PushCommands()
            return commands

    def on_results(self, results: PushResults) -> list[str]:
        """The worker's answer after a step. Returns engine requests whose blocks may be given back."""
        with self._lock:
            for failure in results.failed:
                out = self._all.get(failure.handoff)
                if out is not None and out.state is Sending.MOVING:
                    self._give_up(out, Event.ABORT, failure.why)
            for pushed in results.pushed:
                self._on_pushed(pushed)
            for quiet in results.quiet:
                self._on_quiet(quiet)
            return self._releasable()

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
                self._on_accept(sender, message)
            elif isinstance(message, Decline):
                out = self._all.of(message.handoff)
                out.why = message.why[:MAX_WHY_CHARACTERS]
                if allows(out.state, Event.DECLINE):
                    self._move(out, Event.DECLINE)
            elif isinstance(message, Cancel):
                self._on_cancel(sender, message)

    def refuse(self, sender: Peer, handoff: str, why: str, *, with_layout: bool = False) -> None:
        """Answers an Accept that cannot be read: another layout or protocol."""
        with self._lock:
            out = self._all.of(handoff)
            out.decode = sender
            if out.state is Sending.NEW:
                self._move(out, Event.DECLINE)
            elif allows(out.state, Event.REFUSE):
                self._move(out, Event.REFUSE)
            self._ports.send(sender, Refused(handoff, why, self._layout if with_layout else None))

    def on_peer_lost(self, control: str) -> None:
        """The process behind this control address is gone."""
        with self._lock:
            boot_ids = set()
            for out in self._all:
                if out.decode is None or out.decode.control != control:
                    continue
                boot_ids.add(out.decode.boot_id)  # also of ended hand-offs: its memory may still be mapped
                if allows(out.state, Event.PEER_LOST):
                    self._give_up(out, Event.PEER_LOST, "the decode instance died")
            self._commands.forget.extend(boot_ids)

    def tick(self) -> None:
        """Ends hand-offs that are past their deadline."""
        now_s = self._ports.clock.monotonic_s()
        with self._lock:
            for out in self._all:
                if now_s > out.deadline_s and allows(out.state, Event.DEADLINE):
                    self._give_up(out, Event.DEADLINE, "deadline")

    # ---- inside the lock ----

    def _move(self, out: Outgoing, event: Event) -> None:
        out.state = advance_sending(out.state, event)
        if out.state is Sending.RELEASED:
            self._reports.ended(out, event)

    def _on_accept(self, sender: Peer, accept: Accept) -> None:
        out = self._all.of(accept.handoff, accept.timeout_s)
        if out.accept is None and not self._all.has_room(out, accept):
            self.refuse(sender, accept.handoff, "too much is accepted here before it was asked for")
            return
        if out.accept is None:
            out.decode, out.accept = sender, accept
            out.moments["accepted"] = self._ports.clock.unix_s()
        if out.state is Sending.RELEASED:
            self._ports.send(sender, Refused(out.id, out.why or "the prefill side has ended this hand-off"))
        elif allows(out.state, Event.ACCEPT):
            self._move(out, Event.ACCEPT)
            self._ports.faults.reach("accepted")
            self._compare(out)
            self._ports.wake()

    def _compare(self, out: Outgoing) -> None:
        """Once both sides have spoken: the prompts must be the same, token by token."""
        if out.state is not Sending.ACCEPTED or out.prompt is None or out.accept is None or out.decode is None:
            return
        out.why = self._objection(out.prompt, out.accept, out.decode)
        if not out.why:
            out.lanes = lanes(self._layout, self._me.num_ranks, out.decode.num_ranks)
            return
        self._move(out, Event.REFUSE)
        self._ports.send(out.decode, Refused(out.id, out.why))

    def _objection(self, prompt: Prompt, accept: Accept, decode: Peer) -> str:
        """Why this Accept does not fit the prompt, or us; empty if it does."""
        why = objection(self._layout, self._me.num_ranks, decode.num_ranks)
        if why or (accept.num_senders, len(accept.schemes)) != (self._me.num_ranks, decode.num_ranks):
            awaited = f"transports of {len(accept.schemes)} and awaits {accept.num_senders}"
            why = why or f"the receiving side offers {awaited}"
            return (
                f"tensor parallel sizes: {self._me.name} has {self._me.num_ranks} ranks, {decode.name} "
                f"{decode.num_ranks}: {why}"
            )
        if (prompt.num_tokens, prompt.hash) != (accept.num_prompt_tokens, accept.prompt_hash):
            return (
                f"prompts differ: {self._me.name} has {prompt.num_tokens} tokens (hash {prompt.hash.hex()[:12]}), "
                f"{decode.name} has {accept.num_prompt_tokens} (hash {accept.prompt_hash.hex()[:12]})"
            )
        end_block = -(-accept.num_tokens // self._layout.block_size)
        is_sound = 0 <= accept.first_block < end_block and accept.num_tokens < prompt.num_tokens
        if not is_sound or len(accept.block_ids) != end_block - accept.first_block:
            span = f"{len(accept.block_ids)} blocks from {accept.first_block}"
            return f"impossible Accept: {span} for {accept.num_tokens} tokens"
        return ""

    def _on_cancel(self, sender: Peer, cancel: Cancel) -> None:
        out = self._all.of(cancel.handoff)
        out.decode = sender
        if out.state is Sending.MOVING:
            self._give_up(out, Event.CANCEL, cancel.why[:MAX_WHY_CHARACTERS])
        elif out.state is not Sending.STOPPING:
            if allows(out.state, Event.CANCEL):
                out.why = cancel.why[:MAX_WHY_CHARACTERS]
                self._move(out, Event.CANCEL)
            self._ports.send(sender, Cancelled(out.id))
        self._ports.wake()

    def _give_up(self, out: Outgoing, event: Event, why: str) -> None:
        out.why = why
        self._move(out, event)
        if out.state is Sending.STOPPING:
            self._commands.stop.append(out.id)
        elif out.state is Sending.RELEASED and out.decode is not None and event is not Event.PEER_LOST:
            self._ports.send(out.decode, Refused(out.id, why))
        self._ports.wake()

    def _on_pushed(self, pushed: Pushed) -> None:
        out = self._all.get(pushed.handoff)
        if out is None or not allows(out.state, Event.PUSHED):
            return
        out.add_part(pushed)
        if out.pushed is None:
            return
        pushed = out.pushed
        stopping = out.state is Sending.STOPPING
        self._move(out, Event.PUSHED)
        if stopping or out.decode is None or out.accept is None:
            self._say_stopped(out)
            return
        out.moments["moving"] = pushed.moving_unix_s
        out.moments["last_layer"] = pushed.last_layer_unix_s
        out.moments["computed"] = pushed.computed_unix_s
        self._ports.send(
            out.decode,
            Landed(
                handoff=out.id,
                num_tokens=out.accept.num_tokens,
                num_bytes=pushed.num_bytes,
                parts=[part.part() for part in out.parts],
                moving_unix_s=pushed.moving_unix_s,
                last_layer_unix_s=pushed.last_layer_unix_s,
            ),
        )
        out.moments["landed"] = self._ports.clock.unix_s()
        self._reports.sent(out)
        self._ports.faults.reach("landed")

    def _on_quiet(self, quiet: Quiet) -> None:
        out = self._all.get(quiet.handoff)
        if out is None or out.state is not Sending.STOPPING:
            return
        out.quiet_ranks.add(quiet.rank)
        if len(out.quiet_ranks) == self._me.num_ranks:
            self._move(out, Event.QUIET)
            self._say_stopped(out)

    def _say_stopped(self, out: Outgoing) -> None:
        if out.decode is not None:
            self._ports.send(out.decode, Failed(out.id, out.why))

    def _releasable(self) -> list[str]:
        free = []
        for out in self._all.bound():
            if not out.finished or out.prompt is None:
                continue
            if out.state is Sending.LANDED:
                self._move(out, Event.FINISH)
            if out.state is Sending.RELEASED:
                free.append(out.prompt.request_id)
                self._all.unbind(out)
        return free
