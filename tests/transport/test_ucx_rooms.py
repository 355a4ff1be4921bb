"""What the ucx transport asks for before it is here: into rooms, never into blocks; each room comes back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from core.errors import TransferError
from tests.poll import until
from tests.transport.memory import Owned
from tests.transport.ucx_stranger import Stranger, meanwhile, num_rooms_lent
from transport import schemes
from transport.conformance_pair import finish
from transport.ucx import UcxTransport
from transport.ucx_caller import UcxCaller
from transport.ucx_library import Lease
from transport.ucx_payloads import MAX_RUNNING
from transport.ucx_rooms import MARK_BYTES, MAX_ROOMS
from transport.ucx_wire import Parcel, Part, decode_description
from transport.ucx_worker import UcxPeer, UcxWorker

pytestmark = [
    pytest.mark.ucx,
    pytest.mark.skipif(bool(schemes.unavailable("ucx")), reason=schemes.unavailable("ucx")),
]
APART = [1, 3]


class Waiting:
    """A receiver, and strangers that announce payloads and send them only when they are told to."""

    def __init__(self) -> None:
        self.receiver = Owned(UcxTransport("127.0.0.1"))
        self._lease = Lease("127.0.0.1")
        self._worker = UcxWorker(self._lease)

    def stranger(self) -> Stranger:
        return Stranger(self._worker, decode_description(self.receiver.transport.describe()))

    def announced(self, tag: str, count: int = 1) -> Stranger:
        """A stranger for each of whose announcements a room waits."""
        before, stranger = num_rooms_lent(self.receiver), self.stranger()
        stranger.frames(*(Parcel(number, tag, [Part(0, APART, 0, 4096)]) for number in range(count)))
        expected = min(before + count, MAX_ROOMS)
        meanwhile(stranger, lambda: num_rooms_lent(self.receiver) == expected, "rooms wait")
        return stranger

    def callers(self) -> list[UcxCaller]:
        return list(self.receiver.transport._io._parts.callers.values())  # type: ignore[attr-defined]

    def check_empty(self) -> None:
        assert all(self.receiver.block(each) == bytes(4096) for each in range(8))

    def check_serves(self) -> None:
        sender = Owned(UcxTransport("127.0.0.1"), fill=9)
        landing = self.receiver.expect("proper", [5, 7])
        endpoint = sender.transport.connect(self.receiver.transport.describe())
        finish(endpoint.write("proper", sender.blocks([2, 4]), self.receiver.blocks([5, 7]), b"."))
        assert landing.poll() == [b"."]
        assert landing.close() is True
        assert self.receiver.block(5) == self.receiver.block(7) == b"\x09" * 4096
        endpoint.close()
        sender.transport.close()

    def close(self) -> None:
        self.receiver.transport.close()
        self._lease.give_back()


@pytest.fixture
def waiting() -> Iterator[Waiting]:
    waiting = Waiting()
    yield waiting
    waiting.close()


def test_a_landing_closes_at_once_and_what_comes_later_stays_out(waiting: Waiting) -> None:
    landing = waiting.receiver.expect("t", APART)
    stranger = waiting.announced("t")
    assert landing.close() is True, "nothing of its blocks is being written"
    stranger.payload(0, 8192)
    meanwhile(stranger, lambda: num_rooms_lent(waiting.receiver) == 0, "the payload has come")
    waiting.check_empty()
    stranger.close()
    waiting.check_serves()


def test_a_payload_goes_where_its_frame_says_once_it_comes(waiting: Waiting) -> None:
    landing = waiting.receiver.expect("t", APART)
    stranger = waiting.announced("t")
    stranger.payload(0, 8192)
    meanwhile(stranger, lambda: landing.num_written() == 2, "it is in place")
    assert waiting.receiver.block(1) == waiting.receiver.block(3) == b"\x07" * 4096
    stranger.close()


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, 8192 - MARK_BYTES, 8193, 100_000])
def test_a_payload_of_another_size_leaves_the_blocks_alone(waiting: Waiting, num_bytes: int) -> None:
    landing = waiting.receiver.expect("t", APART)
    stranger = waiting.announced("t")
    stranger.payload(0, num_bytes)
    until(
        lambda: stranger.is_hung_up_on() or num_rooms_lent(waiting.receiver) == 0, 5.0, "it is refused, or hung up on"
    )
    assert landing.num_written() == 0
    waiting.check_empty()
    stranger.close()
    waiting.check_serves()


def test_no_byte_of_an_earlier_payload_is_put_in_place(waiting: Waiting) -> None:
    """A payload that is short by less than the mark is taken for one of wrong bytes, which the digest is for."""
    waiting.check_serves()  # through the only room
    landing = waiting.receiver.expect("t", APART)
    stranger = waiting.announced("t")
    stranger.payload(0, 8192 - 3)
    meanwhile(stranger, lambda: landing.num_written() == 2, "it is in place")
    rooms = waiting.receiver.transport._io._parts.receiver.rooms  # type: ignore[attr-defined]
    assert waiting.receiver.block(3) == b"\x07" * 4093 + rooms._mark[-3:]
    stranger.close()


def test_a_peer_that_goes_leaves_its_rooms(waiting: Waiting) -> None:
    waiting.receiver.expect("t", APART)
    for _ in range(3):
        stranger = waiting.announced("t", MAX_RUNNING)
        stranger.close_at_once()
        until(lambda: num_rooms_lent(waiting.receiver) == 0, 5.0, "its rooms are free again")
    waiting.check_empty()
    waiting.check_serves()


def test_a_receive_that_ucx_refuses_ends_its_connection_alone(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(peer: UcxPeer, tag: int, into: object) -> object:
        raise TransferError("UCX receives nothing from it")

    waiting.receiver.expect("t", APART)
    monkeypatch.setattr(UcxPeer, "receive_ahead", refuses)
    stranger = waiting.stranger()
    stranger.frames(Parcel(0, "t", [Part(0, APART, 0, 4096)]))
    until(stranger.is_hung_up_on, 5.0, "the receiver hangs up")
    assert num_rooms_lent(waiting.receiver) == 0
    monkeypatch.undo()
    waiting.check_serves()
    stranger.close_at_once()


def test_peers_that_keep_every_room_waiting_hold_up_nobody(waiting: Waiting) -> None:
    waiting.receiver.expect("t", APART)
    strangers = [waiting.announced("t", MAX_RUNNING) for _ in range(MAX_ROOMS // MAX_RUNNING + 1)]
    strangers[-1].flush()
    waiting.check_serves()
    assert num_rooms_lent(waiting.receiver) == MAX_ROOMS
    for stranger in strangers:
        stranger.close_at_once()
    until(lambda: num_rooms_lent(waiting.receiver) == 0, 5.0, "every room is free again")


def test_where_a_rendezvous_is_possible_nothing_is_asked_for_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """UCX has crashed where an endpoint was closed in the middle of one."""
    monkeypatch.setenv("UCX_RNDV_THRESH", "512")
    waiting = Waiting()
    waiting.receiver.expect("t", APART)
    stranger = waiting.stranger()
    stranger.frames(Parcel(0, "t", [Part(0, APART, 0, 4096)]))
    meanwhile(stranger, lambda: any(caller.waiting for caller in waiting.callers()), "its frame waits")
    assert num_rooms_lent(waiting.receiver) == 0
    waiting.check_serves()
    stranger.close_at_once()
    waiting.close()
