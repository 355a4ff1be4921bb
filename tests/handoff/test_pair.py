"""A sender and a receiver under every interleaving: exact blocks, nothing held, no request lost."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from core.clock import ManualClock
from core.handoff import Handoff
from decode.admission import Limits
from tests.handoff.sim import NUM_BLOCKS, SimEngine

SIZES = [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (1, 4), (4, 4)]
"""Tensor parallel sizes; of four ranks, two hold the same of the two heads."""


class TwoEngines(RuleBasedStateMachine):
    """One P, one D, each of one to four ranks; requests arrive, messages travel late, clients leave, P dies, deadlines
    pass."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.ids: list[str] = []
        self.aborted: set[str] = set()

    @initialize(sizes=st.sampled_from(SIZES))
    def begin(self, sizes: tuple[int, int]) -> None:
        self.prefill = SimEngine("p", self.clock, num_ranks=sizes[0])
        self.decode = SimEngine("d-", self.clock, Limits(recomputes=2), num_ranks=sizes[1])

    @precondition(lambda self: len(self.ids) < 6)
    @rule(num_tokens=st.integers(1, 30), same=st.booleans(), first=st.sampled_from("pd"))
    def arrive(self, num_tokens: int, same: bool, first: str) -> None:
        """Both legs of one request; `same` is false where the two sides tokenised differently."""
        handoff = Handoff(f"h{len(self.ids)}", self.decode.peer, self.prefill.peer, timeout_s=30)
        self.ids.append(handoff.id)
        self.decode.add(handoff, num_tokens, b"x")
        self.prefill.add(handoff, num_tokens, b"x" if same else b"y")

    @rule()
    def step_prefill(self) -> None:
        self.prefill.step()

    @rule()
    def step_decode(self) -> None:
        self.decode.step()

    @precondition(lambda self: self.prefill.outbox)
    @rule()
    def to_decode(self) -> None:
        peer, message = self.prefill.outbox.popleft()
        assert peer == self.decode.peer
        self.decode.deliver(self.prefill.peer, message)

    @precondition(lambda self: self.decode.outbox)
    @rule()
    def to_prefill(self) -> None:
        peer, message = self.decode.outbox.popleft()
        assert peer == self.prefill.peer
        if self.prefill.is_alive:
            self.prefill.deliver(self.decode.peer, message)

    @precondition(lambda self: self.ids)
    @rule(index=st.integers(0, 5))
    def client_leaves(self, index: int) -> None:
        handoff = self.ids[index % len(self.ids)]
        self.aborted.add(handoff)
        self.decode.abort(handoff)
        self.prefill.abort(handoff)

    @precondition(lambda self: self.ids)
    @rule(index=st.integers(0, 5))
    def prefill_leg_breaks(self, index: int) -> None:
        self.prefill.abort(self.ids[index % len(self.ids)])

    @precondition(lambda self: self.prefill.is_alive and self.ids)
    @rule(dice=st.integers(0, 9))
    def prefill_dies(self, dice: int) -> None:
        if dice == 0:
            self._kill_prefill()

    @rule(seconds=st.sampled_from([1, 1, 1, 20, 40]))
    def time_passes(self, seconds: int) -> None:
        self.clock.advance(seconds)
        self.prefill.sender.tick()
        self.decode.receiver.tick()

    @invariant()
    def no_block_is_owned_twice(self) -> None:
        for engine in (self.prefill, self.decode):
            owned = [b for request in engine.requests.values() for b in request.blocks]
            assert len(owned) == len(set(owned))
            assert not engine.free & set(owned)
            if engine.is_alive:
                assert len(owned) + len(engine.free) == NUM_BLOCKS

    def _kill_prefill(self) -> None:
        self.prefill.kill()
        self.decode.receiver.on_peer_lost(self.prefill.peer.control)

    def teardown(self) -> None:
        """Let everything run out: each request of a living client completes on D, and every block comes back."""
        for _ in range(400):
            self.prefill.step()
            self.decode.step()
            while self.prefill.outbox:
                self.to_decode()
            while self.decode.outbox:
                self.to_prefill()
            self.clock.advance(0.5)
            self.prefill.sender.tick()
            self.decode.receiver.tick()
        for handoff in self.ids:
            request = self.decode.requests[handoff]
            assert request.status == "done" or handoff in self.aborted, (request, self.decode.receiver._all)
        assert len(self.decode.free) == NUM_BLOCKS
        if self.prefill.is_alive:
            assert len(self.prefill.free) == NUM_BLOCKS
            self.prefill.kill()
        self.decode.kill()


TwoEngines.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestTwoEngines = TwoEngines.TestCase
