"""Room for frames: nobody gets what another frame still holds, and what is kept has a bound."""

from __future__ import annotations

from transport.zmq_buffers import MAX_FREE_BYTES, FrameBuffers


def test_room_is_lent_again_only_after_its_frame_was_answered() -> None:
    buffers = FrameBuffers()
    first = buffers.lend(1, 1000)
    first[:] = b"a" * 1000
    second = buffers.lend(2, 1000)
    second[:] = b"b" * 1000
    assert bytes(first) == b"a" * 1000
    buffers.answered(1)
    third = buffers.lend(3, 500)
    third[:] = b"c" * 500
    assert bytes(first[:500]) == b"c" * 500, "the answered frame's room"
    assert bytes(second) == b"b" * 1000


def test_room_that_is_too_small_is_not_lent() -> None:
    buffers = FrameBuffers()
    buffers.lend(1, 10)
    buffers.answered(1)
    assert len(buffers.lend(2, 1000)) == 1000


def test_no_more_is_kept_than_the_bound_and_an_answer_counts_once() -> None:
    buffers = FrameBuffers()
    size = 1 << 20
    rooms = [buffers.lend(number, size) for number in range(2 * MAX_FREE_BYTES // size)]
    for number in range(len(rooms)):
        buffers.answered(number)
        buffers.answered(number)
    again = {id(buffers.lend(100 + number, size).obj) for number in range(len(rooms))}
    assert len(again) == len(rooms)
    assert len(again & {id(room.obj) for room in rooms}) == MAX_FREE_BYTES // size
