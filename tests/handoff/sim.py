"""Two small engines around the real senders, receivers, pushers and landers: everything but the model is real.

A `SimEngine` schedules like vLLM does where it matters here: a block pool, a waiting queue that asks the connector,
chunked prefill, requests that hold blocks while they wait for a peer, delayed frees. The "KV cache" of token t of
request r in layer l is a byte that depends on all three, so a block that was lost, torn, misplaced or overwritten
after it was given to someone else is seen by reading it.
"""

from __future__ import annotations

import ctypes
import itertools
from collections import deque
from dataclasses import dataclass, field

from core.clock import ManualClock
from core.handoff import Handoff, Peer
from core.layout import KVLayout
from core.prompt import Prompt
from core.report import Report
from decode.accounts import Accounts
from decode.admission import Capacity, Limits
from decode.incoming import Offer
from decode.land import LandResults, Received
from decode.lander import Lander
from decode.receiver import Receiver
from prefill.connections import Connections
from prefill.push import PushResults
from prefill.pusher import PagedCache, Pusher
from prefill.sender import Gate, Sender
from transport.base import Region, Transport
from transport.faultpoint import FaultPoint
from transport.inproc import InprocTransport
from transport.messages import Accept, Cancel, Decline, Message
from transport.ports import Ports
from transport.runs import heads_of

LAYERS, HEADS, BLOCK_SIZE, ROW_BYTES, NUM_BLOCKS, CHUNK = 3, 2, 4, 32, 24, 6
HEAD_BYTES = BLOCK_SIZE * ROW_BYTES

LAYOUT = KVLayout("m", "bfloat16", LAYERS, HEADS, 8, BLOCK_SIZE, HEADS * HEAD_BYTES, "LBHNC", "vec")


def row(request: str, layer: int, head: int, token: int) -> bytes:
    """The KV of one head of one token of one request in one layer."""
    return bytes([hash((request, layer, head, token)) % 251 + 1]) * ROW_BYTES


@dataclass
class SimRequest:
    """One engine's view of a request."""

    prompt: Prompt
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    handed_over: int = 0
    status: str = "waiting"  # waiting, remote, running, done, aborted


class SimRank:
    """One tensor-parallel worker: its heads of every block, and who moves them."""

    def __init__(self, rank: int, num_ranks: int, clock: ManualClock, layout: KVLayout) -> None:
        self.heads = heads_of(layout.num_kv_heads, num_ranks, rank)
        size = len(self.heads) * HEAD_BYTES
        self.memory = [ctypes.create_string_buffer(NUM_BLOCKS * size) for _ in range(LAYERS)]
        self.regions = [
            Region(layer, ctypes.addressof(memory), size, size, NUM_BLOCKS) for layer, memory in enumerate(self.memory)
        ]
        self.transport = InprocTransport()
        for region in self.regions:
            self.transport.register(region)
        transports: dict[str, Transport] = {"inproc": self.transport}
        self.connections = Connections(transports, clock)
        self.pusher = Pusher(self.connections, PagedCache(self.regions, BLOCK_SIZE), clock, FaultPoint(), rank)
        self.lander = Lander(transports, self.regions, clock, FaultPoint(), rank)

    def addresses(self, layer: int, block: int, offset: int) -> list[tuple[int, int]]:
        """(head, where its row of one token lies), for each head of this rank."""
        start = self.regions[layer].address + block * self.regions[layer].stride + offset * ROW_BYTES
        return [(head, start + index * HEAD_BYTES) for index, head in enumerate(self.heads)]

    def kill(self) -> None:
        self.pusher.close()
        self.transport.close()


class SimEngine:
    """One instance. `outbox` holds (receiver, message) until the test delivers it."""

    def __init__(
        self,
        name: str,
        clock: ManualClock,
        limits: Limits | None = None,
        num_ranks: int = 1,
        layout: KVLayout = LAYOUT,
    ) -> None:
        self.clock = clock
        self.peer = Peer(name, f"tcp://127.0.0.1:{1000 + len(name)}", f"boot-{name}", num_ranks)
        self.outbox: deque[tuple[Peer, Message]] = deque()
        self.reports: list[Report] = []
        self.free = set(range(NUM_BLOCKS))
        self.requests: dict[str, SimRequest] = {}
        self.ended: dict[str, list[bool]] = {}
        self.is_alive = True
        self.ranks = [SimRank(rank, num_ranks, clock, layout) for rank in range(num_ranks)]
        ports = Ports(self._send, lambda: None, self.reports.append, clock, FaultPoint())
        self.sender = Sender(self.peer, layout, ports)
        offer = Offer(layout, [[("inproc", rank.transport.describe())] for rank in self.ranks])
        self.accounts = Accounts(name, self.reports.append)
        self.receiver = Receiver(self.peer, offer, ports, self.accounts, limits or Limits())

    def _send(self, peer: Peer, message: Message) -> bool:
        self.outbox.append((peer, message))
        return True

    # ---- what the outside does ----

    def add(self, handoff: Handoff, num_tokens: int, prompt_hash: bytes) -> None:
        """A request arrives."""
        request_id = f"{handoff.id}@{self.peer.name}"
        self.requests[handoff.id] = SimRequest(Prompt(request_id, handoff, num_tokens, prompt_hash))

    def abort(self, handoff: str) -> None:
        """The client of a request is gone."""
        request = self.requests.get(handoff)
        if request is not None and request.status in ("waiting", "remote", "running"):
            self._finish(request, completed=False)

    def deliver(self, sender: Peer, message: Message) -> None:
        """One control message arrives."""
        if isinstance(message, Accept | Decline | Cancel):
            self.sender.on_message(sender, message)
        else:
            self.receiver.on_message(sender, message)

    def kill(self) -> None:
        """kill -9: nothing more is written or said."""
        self.is_alive = False
        for rank in self.ranks:
            rank.kill()
        self.outbox.clear()

    # ---- one engine step ----

    def step(self) -> None:
        """Schedule, forward, update: as vLLM does."""
        if not self.is_alive:
            return
        chunks = self._schedule()
        pushed, landed = self._forward(chunks)
        for request, _, end in chunks:
            if request.status == "running" and end == request.prompt.num_tokens:
                self._finish(request, completed=True)
        self._count(landed)
        self.receiver.on_results(landed)
        for request_id in self.sender.on_results(pushed):
            self._free(self.requests[request_id.split("@")[0]])

    def _forward(self, chunks: list[tuple[SimRequest, int, int]]) -> tuple[PushResults, LandResults]:
        land, push = self.receiver.take_commands(), self.sender.take_commands()
        for rank in self.ranks:
            rank.lander.begin_step(land)
            rank.pusher.begin_step(push)
        for layer in range(LAYERS):
            for request, begin, end in chunks:
                for token in range(begin, end):
                    self._write_token(request, layer, token)
            for rank in self.ranks:
                rank.pusher.save_layer(layer)
        pushed, landed = PushResults(), LandResults()
        for rank in self.ranks:
            rank.pusher.sweep()
            pushed = pushed.with_those_of(rank.pusher.end_step())
            landed = landed.with_those_of(rank.lander.end_step())
        return pushed, landed

    def _schedule(self) -> list[tuple[SimRequest, int, int]]:
        for request in self.requests.values():
            if request.status == "waiting":
                self._admit(request)
        chunks = []
        for request in self.requests.values():
            if request.status == "running" and request.computed < request.prompt.num_tokens:
                begin = request.computed
                request.computed = min(begin + CHUNK, request.prompt.num_tokens)
                chunks.append((request, begin, request.computed))
                self._tell(request, begin)
        return chunks

    def _tell(self, request: SimRequest, begin: int) -> None:
        prompt = request.prompt
        if self._sends(request):
            self.sender.chunk(prompt.request_id, request.computed, list(request.blocks))
        else:
            num_new = request.computed - begin
            self.receiver.scheduled(prompt.request_id, prompt.handoff.id, begin, num_new, prompt.num_tokens)

    def _sends(self, request: SimRequest) -> bool:
        prefill = request.prompt.handoff.prefill
        return prefill is not None and prefill.boot_id == self.peer.boot_id

    def _admit(self, request: SimRequest) -> None:
        prompt = request.prompt
        from_peer: int | None = 0
        if self._sends(request):
            if self.sender.admit(prompt) is Gate.WAIT:
                return
        else:
            from_peer = self.receiver.look_up(prompt, 0, self._capacity)
        if from_peer is None:
            return
        blocks = self._allocate(from_peer or prompt.num_tokens)
        if blocks is None:
            return
        request.blocks = blocks
        request.status = "remote" if from_peer else "running"
        if self._sends(request):
            self.sender.started(prompt.request_id)
        else:
            self.receiver.reserve(prompt.request_id, list(blocks), from_peer, 0)
            if not from_peer:
                self.accounts.found(prompt.request_id, prompt.handoff.id, prompt.num_tokens, 0)

    def _capacity(self) -> Capacity:
        return Capacity(NUM_BLOCKS, len(self.free), 0)

    def _allocate(self, num_tokens: int) -> list[int] | None:
        needed = -(-num_tokens // BLOCK_SIZE)
        if needed > len(self.free):
            return None
        return [self.free.pop() for _ in range(needed)]

    def _count(self, landed: LandResults) -> None:
        """As vLLM does: a request has arrived when every rank has said so, and failed if any has."""
        for ended in landed.ended():
            of_ranks = self.ended.setdefault(ended.handoff, [])
            of_ranks.append(isinstance(ended, Received))
            if len(of_ranks) == len(self.ranks):
                self._settle(self.requests[ended.handoff], received=all(self.ended.pop(ended.handoff)))

    def _settle(self, request: SimRequest, *, received: bool) -> None:
        """vLLM's reaction to finished_recving and failed_recving."""
        if request.status != "remote":
            assert request.status == "aborted"
            self._free(request)
        elif received:
            request.handed_over = request.computed = request.prompt.num_tokens - 1
            self.check(request, request.handed_over)
            if request.prompt.num_tokens > len(request.blocks) * BLOCK_SIZE:
                extra = self._allocate(1)
                if extra is None:  # preempted before its first step: computed anew
                    self._free(request)
                    request.computed, request.status = 0, "waiting"
                    return
                request.blocks += extra
            request.status = "running"
        else:
            self._free(request)
            request.status = "waiting"

    def _finish(self, request: SimRequest, *, completed: bool) -> None:
        was_remote = request.status == "remote"
        if completed:
            self.check(request, request.prompt.num_tokens)
        request.status = "done" if completed else "aborted"
        if self._sends(request):
            held = self.sender.finished(request.prompt.request_id, completed=completed)
        else:
            self.receiver.finished(request.prompt.request_id)
            held = was_remote
        if not held:
            self._free(request)

    def _free(self, request: SimRequest) -> None:
        assert not self.free & set(request.blocks), "a block was given back twice"
        self.free |= set(request.blocks)
        request.blocks = []

    # ---- memory ----

    def _write_token(self, request: SimRequest, layer: int, token: int) -> None:
        block, offset = request.blocks[token // BLOCK_SIZE], token % BLOCK_SIZE
        for rank in self.ranks:
            for head, address in rank.addresses(layer, block, offset):
                ctypes.memmove(address, row(request.prompt.handoff.id, layer, head, token), ROW_BYTES)

    def check(self, request: SimRequest, num_tokens: int) -> None:
        """Every token's KV is this request's, in every layer and head."""
        for layer, token, rank in itertools.product(range(LAYERS), range(num_tokens), self.ranks):
            block, offset = request.blocks[token // BLOCK_SIZE], token % BLOCK_SIZE
            for head, address in rank.addresses(layer, block, offset):
                found = ctypes.string_at(address, ROW_BYTES)
                assert found == row(request.prompt.handoff.id, layer, head, token), (request, layer, head, token)
