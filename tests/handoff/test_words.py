"""What a sender and a receiver answer to each other, one case at a time."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from core.clock import ManualClock
from core.handoff import Handoff
from core.layout import KVLayout
from decode.admission import Limits
from prefill.outgoing_table import MAX_EARLY_BYTES
from tests.handoff.sim import LAYOUT, NUM_BLOCKS, SimEngine
from transport.messages import Accept, Cancel, Cancelled, Decline, Failed, Landed, Message, Refused


class Pair:
    """One P, one D, and the mail between them."""

    def __init__(self, ranks: tuple[int, int] = (1, 1), layout: KVLayout = LAYOUT, **limits: Any) -> None:
        self.clock = ManualClock()
        self.prefill = SimEngine("p", self.clock, num_ranks=ranks[0], layout=layout)
        self.decode = SimEngine("d-", self.clock, Limits(**limits), ranks[1], layout)

    def ask(self, name: str, num_tokens: int = 21) -> Handoff:
        handoff = Handoff(name, self.decode.peer, self.prefill.peer, timeout_s=30)
        self.decode.add(handoff, num_tokens, b"x")
        self.prefill.add(handoff, num_tokens, b"x")
        return handoff

    def mail(self, sender: SimEngine) -> list[Message]:
        """Delivers everything that one side has said; returns it."""
        said = [message for _, message in sender.outbox]
        sender.outbox.clear()
        receiver = self.decode if sender is self.prefill else self.prefill
        for message in said:
            receiver.deliver(sender.peer, message)
        return said

    def run(self, steps: int = 40) -> list[Message]:
        said = []
        for _ in range(steps):
            self.decode.step()
            said += self.mail(self.decode)
            self.prefill.step()
            said += self.mail(self.prefill)
        return said


def kinds(messages: list[Message]) -> list[type]:
    return [type(message) for message in messages]


def test_a_hand_off_is_accept_and_landed_and_nothing_more() -> None:
    pair = Pair()
    pair.ask("a")
    assert kinds(pair.run()) == [Accept, Landed]
    assert pair.decode.requests["a"].handed_over == 20
    assert len(pair.decode.free) == len(pair.prefill.free) == NUM_BLOCKS


def test_the_sender_takes_no_block_before_accept() -> None:
    pair = Pair()
    pair.ask("a")
    for _ in range(5):
        pair.prefill.step()
    assert len(pair.prefill.free) == NUM_BLOCKS
    assert pair.prefill.requests["a"].status == "waiting"


def test_a_prompt_shorter_than_a_block_is_declined_and_computed() -> None:
    pair = Pair()
    pair.ask("a", num_tokens=4)
    assert kinds(pair.run()) == [Decline]
    assert pair.decode.requests["a"].status == "done"


def test_a_cancel_is_answered_even_for_an_unknown_hand_off() -> None:
    pair = Pair()
    pair.prefill.deliver(pair.decode.peer, Cancel("never-seen", "deadline"))
    assert [m for _, m in pair.prefill.outbox] == [Cancelled("never-seen")]


@pytest.mark.parametrize("timeout_s", [30.0, math.inf, math.nan, -1.0])
def test_accepts_for_requests_that_never_come_are_bounded_and_make_room_at_their_deadline(timeout_s: float) -> None:
    pair = Pair()
    accept = Accept("", 21, b"x", 0, list(range(100_000)), 20, [], True, timeout_s)
    for number in range(200):
        pair.prefill.deliver(pair.decode.peer, msgspec.structs.replace(accept, handoff=f"invented-{number}"))
    answers = [message for _, message in pair.prefill.outbox]
    assert kinds(answers) == [Refused] * (200 - MAX_EARLY_BYTES // 800_512)
    assert pair.prefill.sender.num_early_bytes() <= MAX_EARLY_BYTES
    pair.prefill.outbox.clear()
    pair.clock.advance(100)
    pair.prefill.sender.tick()
    pair.prefill.outbox.clear()
    pair.ask("a")
    assert kinds(pair.run()) == [Accept, Landed]
    pair.prefill.deliver(pair.decode.peer, msgspec.structs.replace(accept, handoff="one more"))
    assert not pair.prefill.outbox
    assert pair.prefill.sender.num_early_bytes() < 1_000_000


def test_a_cancelled_hand_off_cannot_be_started_by_a_late_accept() -> None:
    pair = Pair()
    pair.ask("a")
    pair.decode.step()
    accept = pair.decode.outbox.popleft()[1]
    pair.prefill.deliver(pair.decode.peer, Cancel("a", "client gone"))
    pair.prefill.deliver(pair.decode.peer, accept)
    pair.prefill.step()
    assert kinds([m for _, m in pair.prefill.outbox]) == [Cancelled, Refused]
    assert len(pair.prefill.free) == NUM_BLOCKS


@pytest.mark.parametrize(
    "change",
    [{"first_block": -1}, {"first_block": 9}, {"block_ids": [1]}, {"num_tokens": 99}, {"prompt_hash": b"other"}],
)
def test_an_accept_that_does_not_fit_is_refused_and_the_prompt_computed(change: dict[str, Any]) -> None:
    pair = Pair()
    pair.ask("a")
    pair.decode.step()
    _, accept = pair.decode.outbox.popleft()
    assert isinstance(accept, Accept)
    pair.prefill.deliver(pair.decode.peer, msgspec.structs.replace(accept, **change))
    assert Refused in kinds(pair.run())
    assert pair.decode.requests["a"].status == "done"
    assert pair.decode.requests["a"].handed_over == 0


def test_no_more_than_the_budget_is_recomputed_at_once() -> None:
    pair = Pair(recomputes=2, reserved_share=1.0)
    for name in "abcd":
        pair.ask(name, num_tokens=17)
    pair.decode.step()
    pair.prefill.kill()
    pair.decode.receiver.on_peer_lost(pair.prefill.peer.control)
    busiest = 0
    for _ in range(60):
        pair.decode.step()
        busiest = max(busiest, sum(r.status == "running" for r in pair.decode.requests.values()))
    assert busiest == 2
    assert all(request.status == "done" for request in pair.decode.requests.values())


def test_reserved_blocks_stay_under_their_share() -> None:
    pair = Pair(reserved_share=0.5)
    for name in "abcd":
        pair.ask(name, num_tokens=21)
    pair.decode.step()
    reserved = sum(len(request.blocks) for request in pair.decode.requests.values())
    assert reserved <= NUM_BLOCKS // 2
    assert kinds(pair.run(200)).count(Landed) == 4


def test_a_leg_that_breaks_on_the_prefill_side_is_told_and_computed() -> None:
    pair = Pair()
    pair.ask("a", num_tokens=30)
    pair.decode.step()
    pair.mail(pair.decode)
    pair.prefill.step()
    pair.prefill.abort("a")
    said = pair.run()
    assert Failed in kinds(said)
    assert Landed not in kinds(said)
    assert pair.decode.requests["a"].status == "done"
    assert len(pair.prefill.free) == NUM_BLOCKS


def test_the_memory_of_a_dead_receiver_is_let_go_although_no_hand_off_is_under_way() -> None:
    """A mapping that is kept would keep the dead instance's whole KV cache in memory."""
    pair = Pair()
    pair.ask("a")
    pair.run()
    assert pair.prefill.ranks[0].connections.num_endpoints() == 1
    pair.decode.kill()
    pair.prefill.sender.on_peer_lost(pair.decode.peer.control)
    pair.prefill.step()
    assert pair.prefill.ranks[0].connections.num_endpoints() == 0
