"""Hand-offs between tensor parallel sizes: every head arrives where it belongs, or it is said why not."""

from __future__ import annotations

import ctypes

import msgspec
import pytest

from core.handoff import Handoff
from tests.handoff.sim import HEADS, LAYERS, LAYOUT, NUM_BLOCKS
from tests.handoff.test_words import Pair, kinds
from transport.messages import Accept, Decline, Failed, Landed, Refused

INTERLEAVED = msgspec.structs.replace(LAYOUT, order="LBNHC")


def why_lost(pair: Pair) -> str:
    [why] = {report.why for report in pair.decode.reports if report.outcome == "fell_back"}
    return why


@pytest.mark.parametrize("ranks", [(1, 2), (2, 1), (2, 2), (1, 4), (4, 1), (2, 4), (4, 2)])
def test_each_rank_gets_its_heads_and_the_sender_says_once_that_all_have_landed(ranks: tuple[int, int]) -> None:
    pair = Pair(ranks)
    pair.ask("a")
    said = pair.run()
    assert kinds(said) == [Accept, Landed]
    assert pair.decode.requests["a"].handed_over == 20, "and the simulated engine has looked at every head"
    landed = said[1]
    assert isinstance(landed, Landed)
    assert {part.receiver for part in landed.parts} == set(range(ranks[1]))
    assert {part.num_pairs for part in landed.parts} == {5 * LAYERS}
    assert len(pair.decode.free) == len(pair.prefill.free) == NUM_BLOCKS


def test_one_ranks_torn_block_is_found_and_the_prompt_is_computed() -> None:
    pair = Pair((2, 1))
    pair.ask("a")
    pair.decode.step()
    pair.mail(pair.decode)
    while not pair.prefill.outbox:
        pair.prefill.step()
    region = pair.decode.ranks[0].regions[1]
    second_head = region.address + pair.decode.requests["a"].blocks[0] * region.stride + region.block_bytes // HEADS
    ctypes.memset(second_head, 0, 1)
    pair.run()
    assert "digest differs" in why_lost(pair)
    assert pair.decode.requests["a"].status == "done"


def test_a_rank_that_cannot_write_ends_the_hand_off_for_all_and_no_block_is_kept() -> None:
    pair = Pair((2, 2))
    pair.ask("a")
    pair.decode.step()
    pair.mail(pair.decode)
    pair.decode.ranks[1].transport.close()
    said = pair.run()
    assert Failed in kinds(said)
    assert Landed not in kinds(said)
    assert pair.decode.requests["a"].status == "done"
    assert len(pair.decode.free) == len(pair.prefill.free) == NUM_BLOCKS


def test_sizes_that_do_not_divide_the_heads_are_declined_with_both_values() -> None:
    pair = Pair((2, 2))
    handoff = Handoff("a", pair.decode.peer, msgspec.structs.replace(pair.prefill.peer, num_ranks=3))
    pair.decode.add(handoff, 21, b"x")
    assert kinds(pair.run()) == [Decline]
    assert why_lost(pair) == (
        "tensor parallel sizes: d- has 2 ranks, p 3: 3 tensor-parallel ranks cannot share 2 KV heads equally"
    )
    assert pair.decode.requests["a"].status == "done"


def test_blocks_that_interleave_heads_go_between_equal_sizes_only() -> None:
    equal = Pair((2, 2), INTERLEAVED)
    equal.ask("a")
    assert Landed in kinds(equal.run())
    other = Pair((1, 2), INTERLEAVED)
    other.ask("a")
    assert Landed not in kinds(other.run())
    assert "d- has 2 ranks, p 1" in why_lost(other)
    assert "LBNHC" in why_lost(other)


def test_a_sender_of_another_size_than_the_ticket_says_refuses_with_both_values() -> None:
    """A restart with other options, which the proxy has not heard of yet."""
    pair = Pair((2, 1))
    believed = msgspec.structs.replace(pair.prefill.peer, num_ranks=1)
    pair.decode.add(Handoff("a", pair.decode.peer, believed, timeout_s=30), 21, b"x")
    pair.prefill.add(Handoff("a", pair.decode.peer, pair.prefill.peer, timeout_s=30), 21, b"x")
    said = pair.run()
    [refused] = [message for message in said if isinstance(message, Refused)]
    assert refused.why == (
        "tensor parallel sizes: p has 2 ranks, d- 1: the receiving side offers transports of 1 and awaits 1"
    )
    assert pair.decode.requests["a"].status == "done"
