"""Two small engines around the real senders, receivers, pushers and landers: everything but the model is real.

A `SimEngine` schedules like vLLM does where it matters here: a block pool, a waiting queue that asks the connector,
chunked prefill, requests that hold blocks while they wait for a peer, delayed frees. The "KV cache" of token t of
request r in layer l is a byte that depends on all three, so a block that was lost, torn, misplaced or overwritten
after it was given to someone else is seen by reading it.
"""

from __future__ import annotations

import ctypes
from collections import deque
from dataclasses import dataclass, field

from core.clock import ManualClock
from core.handoff import Handoff, Peer
from core.layout import KVLayout
from core.prompt import Prompt
from core.report import Report
from decode.accounts import Accounts
from decode.admission import Capacity, Limits
from decode.lander import Lander
from decode.receiver import Offer, Receiver
from prefill.connections import Connections
from prefill.pusher import Pusher
from prefill.sender import Gate, Sender
from transport.base import Region, Transport
from transport.faultpoint import FaultPoint
from transport.inproc import InprocTransport
from transport.messages import Accept, Cancel, Decline, Message
from transport.ports import Ports

LAYERS, BLOCK_SIZE, TOKEN_BYTES, NUM_BLOCKS, CHUNK = 3, 4, 32, 24, 6
BLOCK_BYTES = BLOCK_SIZE * TOKEN_BYTES

LAYOUT = KVLayout("m", "bfloat16", LAYERS, 1, 8, BLOCK_SIZE, BLOCK_BYTES, "LBHNC", "vec")


def token_bytes(request: str, layer: int, token: int) -> bytes:
    """The KV of one token of one request in one layer."""
    return bytes([hash((request, layer, token)) % 251 + 1]) * TOKEN_BYTES


@dataclass
class SimRequest:
    """One engine's view of a request."""

    prompt: Prompt
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    handed_over: int = 0
    status: str = "waiting"  # waiting, remote, running, done, aborted


class SimEngine:
    """One instance. `outbox` holds (receiver, message) until the test delivers it."""

    def __init__(self, name: str, clock: ManualClock, limits: Limits | None = None) -> None:
        self.clock = clock
        self.peer = Peer(name, f"tcp://127.0.0.1:{1000 + len(name)}", f"boot-{name}")
        self.outbox: deque[tuple[Peer, Message]] = deque()
        self.reports: list[Report] = []
        self.free = set(range(NUM_BLOCKS))
        self.requests: dict[str, SimRequest] = {}
        self.is_alive = True
        self.memory = [ctypes.create_string_buffer(NUM_BLOCKS * BLOCK_BYTES) for _ in range(LAYERS)]
        self.regions = [
            Region(layer, ctypes.addressof(memory), BLOCK_BYTES, BLOCK_BYTES, NUM_BLOCKS)
            for layer, memory in enumerate(self.memory)
        ]
        self.transport: Transport = InprocTransport()
        for region in self.regions:
            self.transport.register(region)
        faults = FaultPoint()
        transports = {"inproc": self.transport}
        self.connections = Connections(transports, clock)
        self.pusher = Pusher(self.connections, self.regions, BLOCK_SIZE, clock, faults)
        self.lander = Lander(transports, self.regions, clock, faults)
        ports = Ports(self._send, lambda: None, self.reports.append, clock, faults)
        self.sender = Sender(self.peer, LAYOUT, ports)
        offer = Offer(LAYOUT, [("inproc", self.transport.describe())])
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
        self.pusher.close()
        self.transport.close()
        self.outbox.clear()

    # ---- one engine step ----

    def step(self) -> None:
        """Schedule, forward, update: as vLLM does."""
        if not self.is_alive:
            return
        chunks = self._schedule()
        self.lander.begin_step(self.receiver.take_commands())
        self.pusher.begin_step(self.sender.take_commands())
        for layer in range(LAYERS):
            for request, begin, end in chunks:
                for token in range(begin, end):
                    self._write_token(request, layer, token)
            self.pusher.save_layer(layer)
        self.pusher.sweep()
        pushed, landed = self.pusher.end_step(), self.lander.end_step()
        for request, _, end in chunks:
            if request.status == "running" and end == request.prompt.num_tokens:
                self._finish(request, completed=True)
        for lost in landed.lost:
            self._settle(self.requests[lost.handoff], received=False)
        for received in landed.received:
            self._settle(self.requests[received.handoff], received=True)
        self.receiver.on_results(landed)
        for request_id in self.sender.on_results(pushed):
            self._free(self.requests[request_id.split("@")[0]])

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
        content = token_bytes(request.prompt.handoff.id, layer, token)
        start = self.regions[layer].address + block * BLOCK_BYTES + offset * TOKEN_BYTES
        ctypes.memmove(start, content, TOKEN_BYTES)

    def check(self, request: SimRequest, num_tokens: int) -> None:
        """Every token's KV is this request's, in every layer."""
        for layer, region in enumerate(self.regions):
            for token in range(num_tokens):
                block, offset = request.blocks[token // BLOCK_SIZE], token % BLOCK_SIZE
                start = region.address + block * BLOCK_BYTES + offset * TOKEN_BYTES
                found = ctypes.string_at(start, TOKEN_BYTES)
                assert found == token_bytes(request.prompt.handoff.id, layer, token), (request, layer, token)
