"""Counting what arrived in pieces."""

from __future__ import annotations

import ctypes

from hypothesis import given
from hypothesis import strategies as st

from transport.base import Blocks, Region
from transport.landing import MAX_PIECES_PER_BLOCK, Inbox, Pieces
from transport.regions import Span


@given(parts=st.lists(st.tuples(st.integers(0, 31), st.integers(1, 32)).filter(lambda p: sum(p) <= 32), max_size=40))
def test_pieces_cover_a_block_exactly_when_every_byte_has_come(parts: list[tuple[int, int]]) -> None:
    pieces, came = Pieces(), set[int]()
    for start, num_bytes in parts:
        pieces.add(start, start + num_bytes)
        came.update(range(start, start + num_bytes))
    assert pieces.covers(0, 32) == (came == set(range(32)))
    assert pieces.covers(8, 24) == (came >= set(range(8, 24)))
    assert len(pieces) == sum(1 for byte in came if byte - 1 not in came)


def test_a_block_in_too_many_pieces_is_refused() -> None:
    memory = ctypes.create_string_buffer(8192)
    region = Region(0, ctypes.addressof(memory), 8192, 8192, 1)
    landing = Inbox().open("t", [Blocks(0, (0,))], {0: region})
    for piece in range(MAX_PIECES_PER_BLOCK):
        assert landing.refusal(0, [0]) == ""
        landing.record(Span(region, piece * 2, 1), [0])
    assert "too many pieces" in landing.refusal(0, [0])


def test_a_new_landing_under_a_closed_tag_is_not_closed_by_the_old_one() -> None:
    memory = ctypes.create_string_buffer(64)
    region, inbox = Region(0, ctypes.addressof(memory), 64, 64, 1), Inbox()
    old = inbox.open("t", [Blocks(0, (0,))], {0: region})
    assert old.close()
    assert inbox.was_closed("t")
    new = inbox.open("t", [Blocks(0, (0,))], {0: region})
    assert old.close()
    assert inbox.find("t") is new


def test_a_landing_is_closed_only_once_no_receive_into_it_is_held() -> None:
    memory = ctypes.create_string_buffer(64)
    region, inbox = Region(0, ctypes.addressof(memory), 64, 64, 1), Inbox()
    landing = inbox.open("t", [Blocks(0, (0,))], {0: region})
    with inbox.lock:
        landing.hold()
    assert landing.close() is False
    assert inbox.find("t") is None, "nothing new begins"
    with inbox.lock:
        landing.release()
    assert landing.close() is True


def test_blocks_in_a_gpus_memory_are_counted_and_not_read() -> None:
    region, inbox = Region(0, 4096, 64, 64, 1, device=0), Inbox()
    landing = inbox.open("t", [Blocks(0, (0,))], {0: region})
    with inbox.lock:
        landing.record(Span(region, 0, 64), [0])
    assert landing.num_written() == 1
    assert landing.digest() is None
