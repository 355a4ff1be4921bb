"""Copies that helpers share: all bytes right whatever is mixed, no notice before them, none behind a fence."""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections.abc import Iterator

import pytest

from tests.poll import until
from tests.transport.memory import Owned
from transport import native, shared_copies
from transport.base import Blocks, Endpoint, Region, TransferState
from transport.conformance import check_transport
from transport.conformance_pair import finish
from transport.copying import MAX_PIECES_KEPT, plans_of_blocks
from transport.shared_copies import Copy, Helpers, Queue, SharedCopies
from transport.shm import ShmTransport
from transport.transfer import SettledTransfer

BLOCK_BYTES = 256 << 10
NUM_BLOCKS = 32
LARGE_BYTES = 64 << 20
"""Of one piece, which takes some 10 ms."""
FILL = 7


class Two:
    """A sender whose blocks hold 7, and a receiver whose blocks hold 0."""

    def __init__(self, block_bytes: int = BLOCK_BYTES, num_blocks: int = NUM_BLOCKS) -> None:
        self.sender = Owned(ShmTransport(), block_bytes, num_blocks, fill=FILL)
        self.receiver = Owned(ShmTransport(), block_bytes, num_blocks)
        self.endpoint: Endpoint = self.sender.transport.connect(self.receiver.transport.describe())
        self._num_blocks = num_blocks
        self._full = bytes([FILL]) * block_bytes
        finish(self.endpoint.write("hello", self.sender.blocks([0]), self.receiver.blocks([0]), b"connected"))
        self.receiver.put(0, bytes(block_bytes))

    def write(self, ids: list[int]) -> Copy:
        transfer = self.endpoint.write("t", self.sender.blocks(ids), self.receiver.blocks(ids))
        assert isinstance(transfer, Copy), "it was not shared"
        return transfer

    def finish(self, last: int) -> None:
        """Writes one block with a notice."""
        finish(self.endpoint.write("t", self.sender.blocks([last]), self.receiver.blocks([last]), b"all"))

    def filled(self) -> list[int]:
        return [at for at in range(self._num_blocks) if self.receiver.block(at) == self._full]

    def byte(self, at: int) -> ctypes.c_char:
        """Of the receiver's memory, as it is when asked for its value."""
        return ctypes.c_char.from_address(self.receiver.region.address + at)

    def wait_for_first_byte(self) -> None:
        """Of the first block: its copy is under way."""
        first, deadline_s = self.byte(0), time.monotonic() + 20.0
        while first.value == b"\0":
            assert time.monotonic() < deadline_s

    def check_nobody_writes_any_more(self) -> None:
        """Gives the receiver's blocks to somebody else, who finds them unchanged later."""
        self.receiver.put(0, bytes(LARGE_BYTES))
        time.sleep(0.1)
        assert self.receiver.block(0) == bytes(LARGE_BYTES)

    def close(self) -> None:
        self.endpoint.close()
        for owned in (self.sender, self.receiver):
            owned.transport.close()


class Doors:
    """What helpers wait for before they begin."""

    def __init__(self) -> None:
        self.are_open = threading.Event()


@pytest.fixture(autouse=True)
def _two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    native.compile_now()
    if native.compiled() is None:
        pytest.skip("needs numba, which comes with vLLM")
    monkeypatch.setattr(shared_copies, "num_copying_threads", lambda cores: 2)


@pytest.fixture
def doors(monkeypatch: pytest.MonkeyPatch) -> Iterator[Doors]:
    doors, serve = Doors(), Queue.serve

    def serve_later(queue: Queue) -> None:
        assert doors.are_open.wait(60.0)
        serve(queue)

    monkeypatch.setattr(Queue, "serve", serve_later)
    yield doors
    doors.are_open.set()


@pytest.fixture
def two(request: pytest.FixtureRequest) -> Iterator[Two]:
    two = Two()
    yield two
    if "doors" in request.fixturenames:
        request.getfixturevalue("doors").are_open.set()
    two.close()


@pytest.fixture
def large() -> Iterator[Two]:
    two = Two(LARGE_BYTES, 2)
    yield two
    two.close()


def test_a_transport_that_shares_its_copies_does_what_every_transport_must() -> None:
    check_transport(ShmTransport)


def test_whatever_is_mixed_every_block_has_come_when_the_notice_has(two: Two) -> None:
    dice = random.Random(4)
    for turn in range(60):
        wanted = [bytes([turn + 1]) * BLOCK_BYTES for _ in range(NUM_BLOCKS)]
        for at, content in enumerate(wanted):
            two.sender.put(at, content)
        left = dice.sample(range(NUM_BLOCKS), NUM_BLOCKS)
        landing = two.receiver.expect(f"mixed {turn}", range(NUM_BLOCKS))
        transfers = []
        while left:
            count = dice.choice([1, 1, 2, 3, 4, 9])
            some, left = left[:count], left[count:]
            if dice.random() < 0.5:
                some.sort()
            blocks = two.sender.blocks(some), two.receiver.blocks(some)
            transfers.append(two.endpoint.write(f"mixed {turn}", *blocks, None if left else b"all"))
        until(lambda: landing.poll() == [b"all"], what="the notice")  # noqa: B023 - called at once
        assert [two.receiver.block(at) for at in range(NUM_BLOCKS)] == wanted
        assert all(transfer.poll() is TransferState.DONE for transfer in transfers)


def test_a_large_write_returns_before_it_is_copied_and_the_notice_comes_behind_it(doors: Doors, two: Two) -> None:
    landing = two.receiver.expect("t", range(NUM_BLOCKS))
    first = two.write(list(range(9)))
    assert first.poll() is TransferState.RUNNING
    assert two.filled() == []
    two.finish(20)
    until(lambda: landing.poll() == [b"all"], what="the notice")
    assert two.filled() == [*range(9), 20]
    assert first.poll() is TransferState.DONE
    assert 0 < first.copy_s < 1


def test_a_write_of_more_blocks_than_a_plan_has_returns_before_it_is_copied_too(doors: Doors) -> None:
    count = 2 * MAX_PIECES_KEPT + 1
    two = Two(128, 2 * count)
    ids = list(range(0, 2 * count, 2))  # no two of them are neighbours
    transfer = two.endpoint.write("t", two.sender.blocks(ids), two.receiver.blocks(ids))
    assert transfer.poll() is TransferState.RUNNING
    two.finish(1)
    assert two.filled() == sorted([*ids, 1])
    assert transfer.poll() is TransferState.DONE
    doors.are_open.set()
    two.close()


def test_a_notice_waits_for_what_a_helper_is_copying(large: Two) -> None:
    begun = large.write([0])
    large.wait_for_first_byte()
    some, last = Blocks(0, (1,), 0, BLOCK_BYTES), large.byte(LARGE_BYTES - 1)
    large.endpoint.write("t", some, some, b"all")
    assert last.value == bytes([FILL])
    assert large.filled() == [0]
    assert begun.poll() is TransferState.DONE


def test_a_helper_copies_without_a_notice_and_without_being_asked(two: Two) -> None:
    few = two.write([3])
    until(lambda: two.filled() == [3], what="it is copied")
    until(lambda: few.poll() is TransferState.DONE, what="it is done")


def test_a_cancelled_copy_that_was_not_begun_is_never_made(doors: Doors, two: Two) -> None:
    first, cancelled, last = two.write([20]), two.write([21]), two.write([22])
    cancelled.cancel()
    doors.are_open.set()
    two.finish(23)
    assert two.filled() == [20, 22, 23]
    assert (first.poll(), last.poll()) == (TransferState.DONE, TransferState.DONE)
    assert (cancelled.poll(), cancelled.failure()) == (TransferState.FAILED, "cancelled")
    first.cancel()
    assert first.poll() is TransferState.DONE


def test_a_cancelled_copy_is_awaited_where_it_has_begun(large: Two) -> None:
    begun = large.write([0])
    large.wait_for_first_byte()
    begun.cancel()
    large.check_nobody_writes_any_more()


def test_a_closed_endpoint_waits_for_what_helpers_have_begun(large: Two) -> None:
    large.write([0])
    large.wait_for_first_byte()
    large.endpoint.close()
    large.check_nobody_writes_any_more()


def test_an_endpoint_that_closes_takes_only_its_own_copies_along(doors: Doors, two: Two) -> None:
    other = Owned(ShmTransport(), BLOCK_BYTES, NUM_BLOCKS)
    endpoint = two.sender.transport.connect(other.transport.describe())
    finish(endpoint.write("hello", two.sender.blocks([0]), other.blocks([0]), b"connected"))
    copies = []
    for at in (1, 2, 3):
        copies.append(endpoint.write("u", two.sender.blocks([at]), other.blocks([at])))
        two.write([at])
    endpoint.close()
    doors.are_open.set()
    two.finish(9)
    assert two.filled() == [1, 2, 3, 9]
    assert [copy.poll() for copy in copies] == [TransferState.FAILED] * 3
    assert [other.block(at) for at in (1, 2, 3)] == [bytes(BLOCK_BYTES)] * 3
    other.transport.close()


def test_without_helpers_everything_is_copied_within_the_write(two: Two) -> None:
    two.sender.transport.close()
    transfer = two.endpoint.write("t", two.sender.blocks(range(9)), two.receiver.blocks(range(9)))
    assert transfer.poll() is TransferState.DONE
    assert two.filled() == list(range(9))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("baton-copy")]


def test_until_the_loops_are_compiled_everything_is_copied_within_the_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_compiled", None)
    monkeypatch.setattr(native, "_is_tried", False)
    two = Two()
    early = two.endpoint.write("t", two.sender.blocks(range(9)), two.receiver.blocks(range(9)))
    assert isinstance(early, SettledTransfer)
    for _ in range(3):  # whoever connects again while nothing is compiled does not wait a second time
        again = two.sender.transport.connect(two.receiver.transport.describe())
        finish(again.write("again", two.sender.blocks([0]), two.receiver.blocks([31])))
        again.close()
    assert len(native._waiting) == 1
    two.receiver.put(31, bytes(BLOCK_BYTES))
    assert two.filled() == list(range(9))
    native.compile_now()
    two.write([10])
    two.finish(11)
    assert two.filled() == [*range(9), 10, 11]
    two.close()


class Field:
    """Source and target of small pieces, and a queue with so many threads."""

    SIZE, COUNT = 64, 12 * MAX_PIECES_KEPT

    def __init__(self, num_threads: int) -> None:
        self.source, self.target = (ctypes.create_string_buffer(self.SIZE * self.COUNT) for _ in range(2))
        self._regions = [
            Region(0, ctypes.addressof(memory), self.SIZE, self.SIZE, self.COUNT)
            for memory in (self.source, self.target)
        ]
        self.helpers = Helpers()
        self.helpers._num_threads = num_threads
        self.helpers.start()
        self.copies = SharedCopies(self.helpers)

    def start(self, ids: tuple[int, ...]) -> Copy | SettledTransfer:
        blocks = Blocks(0, ids)
        (plan,) = plans_of_blocks(self._regions[0], blocks, self._regions[1], blocks)
        return self.copies.start(plan, self._regions[0].address, self._regions[1].address)


def test_where_the_queue_is_full_a_copy_is_made_at_once(doors: Doors) -> None:
    field = Field(1)
    field.source.raw = bytes([FILL]) * len(field.source)
    ids = tuple(range(0, 2 * MAX_PIECES_KEPT, 2))  # no two of them are neighbours
    kinds = [type(field.start(tuple(each + turn % 2 for each in ids))) for turn in range(9)]
    assert kinds == [Copy] * 8 + [SettledTransfer]
    field.copies.finish()
    assert field.target.raw[: 2 * MAX_PIECES_KEPT * field.SIZE] == bytes([FILL]) * 2 * MAX_PIECES_KEPT * field.SIZE
    doors.are_open.set()
    field.helpers.close()


@pytest.mark.parametrize("num_threads", [1, 3])
def test_half_a_million_pieces_by_several_threads_are_each_where_they_belong(
    num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many times around the queue's ring, too small for all. Of a cancelled copy, pieces are whole or absent."""
    monkeypatch.setattr(shared_copies, "MIN_SHARED_BYTES", 1)
    field, dice = Field(num_threads), random.Random(num_threads)
    for turn in range(20):
        content = bytes([turn + 1]) * field.SIZE
        ctypes.memset(field.source, turn + 1, len(field.source))
        ctypes.memset(field.target, 0, len(field.target))
        ids = dice.sample(range(field.COUNT), field.COUNT)
        some = [tuple(ids[at : at + MAX_PIECES_KEPT // 2]) for at in range(0, field.COUNT, MAX_PIECES_KEPT // 2)]
        copies = [(each, field.start(each)) for each in some]
        cancelled = dice.choice(copies)
        if turn % 2:
            cancelled[1].cancel()
        field.copies.finish()
        found = field.target.raw
        for each, copy in copies:
            pieces = {found[at * field.SIZE : (at + 1) * field.SIZE] for at in each}
            allowed = {content} if copy.poll() is TransferState.DONE else {content, bytes(field.SIZE)}
            assert pieces <= allowed
            assert copy is cancelled[1] or copy.poll() is TransferState.DONE
    field.helpers.close()
