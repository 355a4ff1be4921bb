"""Several writes in one payload: every byte in its place, one answer for all, and nothing that is not expected."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.poll import until
from tests.transport.memory import Owned
from tests.transport.ucx_stranger import Stranger, meanwhile
from transport import schemes
from transport.base import Blocks, Transfer, TransferState
from transport.conformance_pair import finish
from transport.ucx import UcxTransport
from transport.ucx_library import Lease
from transport.ucx_wire import MAX_PARTS, Parcel, Part, decode_description
from transport.ucx_worker import UcxWorker

pytestmark = [
    pytest.mark.ucx,
    pytest.mark.skipif(bool(schemes.unavailable("ucx")), reason=schemes.unavailable("ucx")),
]
BLOCK_BYTES = 128 << 10
NUM_BLOCKS = 64


class Two:
    """A sender with random content, and a receiver of zeros."""

    def __init__(self) -> None:
        self.sender, self.receiver = (Owned(UcxTransport("127.0.0.1"), BLOCK_BYTES, NUM_BLOCKS) for _ in range(2))
        for at in range(NUM_BLOCKS):
            self.sender.put(at, random.Random(at).randbytes(BLOCK_BYTES))
        self.endpoint = self.sender.transport.connect(self.receiver.transport.describe())

    def num_frames(self) -> int:
        """That the sender has numbered so far."""
        return int(self.endpoint._link._window.next_number)  # type: ignore[attr-defined]

    def close(self) -> None:
        self.endpoint.close()
        for owned in (self.sender, self.receiver):
            owned.transport.close()


@pytest.fixture
def two() -> Iterator[Two]:
    two = Two()
    yield two
    two.close()


def test_what_waits_travels_together_and_every_byte_comes_to_its_place(two: Two) -> None:
    """The writes are made before there is a connection, so all of them wait."""
    dice = random.Random(6)
    landing = two.receiver.expect("t", range(NUM_BLOCKS))
    theirs, ours = (dice.sample(range(NUM_BLOCKS), NUM_BLOCKS) for _ in range(2))
    layers = [(start, BLOCK_BYTES // 16) for start in range(0, BLOCK_BYTES // 2, BLOCK_BYTES // 16)]
    layers += [(BLOCK_BYTES // 2, BLOCK_BYTES // 2)]
    transfers = [
        two.endpoint.write(
            "t", Blocks(0, tuple(ours[at : at + 4]), *each), Blocks(0, tuple(theirs[at : at + 4]), *each)
        )
        for at in range(0, NUM_BLOCKS, 4)
        for each in layers
    ]
    finish(*transfers, two.endpoint.write("t", Blocks(0, ()), Blocks(0, ()), b"all"))
    assert landing.poll() == [b"all"]
    assert landing.num_written() == NUM_BLOCKS
    for our_block, their_block in zip(ours, theirs, strict=True):
        assert two.receiver.block(their_block) == two.sender.block(our_block)
    assert two.num_frames() < len(transfers) / 4


def test_more_parts_than_one_parcel_may_have_are_several(two: Two) -> None:
    num_writes = 2 * MAX_PARTS + 1
    landing = two.receiver.expect("t", range(NUM_BLOCKS))
    pieces = [(at % NUM_BLOCKS, at // NUM_BLOCKS * 512) for at in range(num_writes)]
    blocks = [Blocks(0, (block, (block + 2) % NUM_BLOCKS), start, 512) for block, start in pieces]
    finish(*[two.endpoint.write("t", each, each) for each in blocks])
    landing.close()
    for block, start in pieces:
        assert two.receiver.block(block)[start : start + 512] == two.sender.block(block)[start : start + 512]


def test_two_hand_offs_never_share_a_payload_and_one_that_nobody_expects_any_more_ends_alone(two: Two) -> None:
    expected, closed = two.receiver.expect("expected", [1, 3]), two.receiver.expect("closed", [5, 7])
    closed.close()
    good: list[Transfer] = []
    bad: list[Transfer] = []
    for start in range(0, BLOCK_BYTES, BLOCK_BYTES // 8):
        for tag, ids, transfers in (("expected", (1, 3), good), ("closed", (5, 7), bad)):
            blocks = Blocks(0, ids, start, BLOCK_BYTES // 8)
            transfers.append(two.endpoint.write(tag, blocks, blocks))
    finish(*good)
    finish(*bad, state=TransferState.FAILED)
    assert expected.num_written() == 2
    assert two.receiver.block(5) == two.receiver.block(7) == bytes(BLOCK_BYTES)


def test_a_write_that_is_cancelled_while_it_waits_takes_none_of_its_neighbours_along(two: Two) -> None:
    two.receiver.expect("t", range(NUM_BLOCKS))
    transfers = [two.endpoint.write("t", Blocks(0, (at, at + 2)), Blocks(0, (at, at + 2))) for at in range(0, 60, 4)]
    transfers[7].cancel()
    finish(*transfers[:7], *transfers[8:])
    until(lambda: transfers[7].poll() is not TransferState.RUNNING, 5.0, "the cancelled one ends")
    for at in (*range(0, 28, 4), *range(32, 60, 4)):
        assert two.receiver.block(at) == two.sender.block(at)


@pytest.mark.parametrize(
    ("parts", "num_bytes", "why"),
    [
        ([Part(0, [1, 3], 0, 4096), Part(0, [9], 0, 4096)], 3 * 4096, "block 9"),
        ([Part(0, [1, 3], 0, 4096), Part(4, [5], 0, 4096)], 3 * 4096, "region 4"),
        ([Part(0, [1, 3], 0, 4096), Part(0, [5], BLOCK_BYTES, 4096)], 3 * 4096, "outside"),
        ([Part(0, [1, 3], 0, 4096), Part(0, [5], 0, 4096)], 2 * 4096, "another size"),
    ],
    ids=["unexpected", "region", "outside", "short"],
)
def test_a_parcel_of_which_one_part_is_wrong_writes_nothing(
    two: Two, parts: list[Part], num_bytes: int, why: str
) -> None:
    landing = two.receiver.expect("t", [1, 3, 5])
    lease = Lease("127.0.0.1")
    stranger = Stranger(UcxWorker(lease), decode_description(two.receiver.transport.describe()))
    stranger.frames(Parcel(0, "t", parts))
    stranger.payload(0, num_bytes)
    answers: list[str] = []

    def is_refused() -> bool:
        answers.extend(stranger.refusals())
        return bool(answers)

    until(is_refused, 5.0, "it is refused")
    assert why in answers[0]
    assert landing.num_written() == 0
    assert [two.receiver.block(at) for at in (1, 3, 5, 9)] == [bytes(BLOCK_BYTES)] * 4
    stranger.close_at_once()
    lease.give_back()


def test_a_parcel_with_one_block_twice_counts_it_once(two: Two) -> None:
    landing = two.receiver.expect("t", [1, 3, 5])
    lease = Lease("127.0.0.1")
    stranger = Stranger(UcxWorker(lease), decode_description(two.receiver.transport.describe()))
    stranger.frames(Parcel(0, "t", [Part(0, [1, 3], 0, BLOCK_BYTES), Part(0, [1, 3], 0, BLOCK_BYTES)]))
    stranger.payload(0, 4 * BLOCK_BYTES)
    meanwhile(stranger, lambda: landing.num_written() == 2, "both blocks count")
    assert two.receiver.block(1) == two.receiver.block(3) == b"\x07" * BLOCK_BYTES
    stranger.close_at_once()
    lease.give_back()
