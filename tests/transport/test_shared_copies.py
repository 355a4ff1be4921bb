"""Copies that helpers share: all bytes right whatever is mixed, no notice before them, none behind a fence."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest

from tests.poll import until
from tests.transport.memory import Owned
from transport import native, shared_copies
from transport.base import Endpoint, TransferState
from transport.conformance import check_transport
from transport.conformance_pair import finish
from transport.copying import SHARE_BYTES, CopyPlan
from transport.shm import ShmTransport

BLOCK_BYTES = 256 << 10
NUM_BLOCKS = 32
PER_SHARE = SHARE_BYTES // BLOCK_BYTES


class Two:
    """A sender whose blocks hold 7, a receiver whose blocks hold 0, and threads that help, also on one core."""

    def __init__(self) -> None:
        self.sender = Owned(ShmTransport(), BLOCK_BYTES, NUM_BLOCKS, fill=7)
        self.receiver = Owned(ShmTransport(), BLOCK_BYTES, NUM_BLOCKS)
        self.endpoint: Endpoint = self.sender.transport.connect(self.receiver.transport.describe())
        for tag in ("hello", "t"):  # from here on the owner has heard of both
            finish(self.endpoint.write(tag, self.sender.blocks([0]), self.receiver.blocks([0])))
        self.receiver.put(0, bytes(BLOCK_BYTES))

    def write(self, ids: list[int], notice: bytes | None = None) -> shared_copies.Copy:
        transfer = self.endpoint.write("t", self.sender.blocks(ids), self.receiver.blocks(ids), notice)
        assert notice is not None or isinstance(transfer, shared_copies.Copy), "it was not shared"
        return transfer  # type: ignore[return-value]

    def filled(self) -> list[int]:
        return [at for at in range(NUM_BLOCKS) if self.receiver.block(at) == bytes([7]) * BLOCK_BYTES]


class Gate:
    """Helpers stand still before they copy, as long as it is shut."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_open = threading.Event()
        self.is_reached = threading.Event()
        carry_out = CopyPlan.carry_out_compiled

        def gated(plan: CopyPlan, *arguments: object) -> None:
            if threading.current_thread().name.startswith("baton-copy"):
                self.is_reached.set()
                assert self.is_open.wait(20.0)
            carry_out(plan, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(CopyPlan, "carry_out_compiled", gated)


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[Two]:
    native.compile_now()
    if native.copy_pieces() is None:
        pytest.skip("needs numba, which comes with vLLM")
    monkeypatch.setattr(shared_copies, "num_copying_threads", lambda cores: 2)
    two = Two()
    yield two
    two.endpoint.close()
    for owned in (two.sender, two.receiver):
        owned.transport.close()


@pytest.fixture
def gate(two: Two, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.is_open.set()


def test_a_transport_that_shares_its_copies_does_what_every_transport_must(two: Two) -> None:
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
            count = dice.choice([1, 1, 2, 3, PER_SHARE, 2 * PER_SHARE + 1])
            some, left = left[:count], left[count:]
            if dice.random() < 0.5:
                some.sort()
            blocks = two.sender.blocks(some), two.receiver.blocks(some)
            transfers.append(two.endpoint.write(f"mixed {turn}", *blocks, None if left else b"all"))
        until(lambda: landing.poll() == [b"all"], what="the notice")  # noqa: B023 - called at once
        assert [two.receiver.block(at) for at in range(NUM_BLOCKS)] == wanted
        assert all(transfer.poll() is TransferState.DONE for transfer in transfers)


def test_a_large_write_returns_before_it_is_copied_and_the_notice_waits_for_it(two: Two, gate: Gate) -> None:
    landing = two.receiver.expect("t", range(NUM_BLOCKS))
    first = two.write(list(range(PER_SHARE)))
    assert gate.is_reached.wait(20.0)
    assert first.poll() is TransferState.RUNNING
    assert two.filled() == []
    last: list[shared_copies.Copy] = []
    caller = threading.Thread(target=lambda: last.append(two.write(list(range(PER_SHARE, NUM_BLOCKS)), b"all")))
    caller.start()
    until(lambda: len(two.filled()) == NUM_BLOCKS - PER_SHARE, what="the caller copies what no helper has")
    assert landing.poll() == []
    gate.is_open.set()
    caller.join(20.0)
    until(lambda: landing.poll() == [b"all"], what="the notice")
    assert two.filled() == list(range(NUM_BLOCKS))
    assert first.poll() is last[0].poll() is TransferState.DONE


def test_what_is_too_little_for_a_job_is_copied_when_somebody_asks(two: Two) -> None:
    few = two.write([3])
    until(lambda: few.poll() is TransferState.DONE, what="it is copied without a notice")
    assert two.filled() == [3]


def test_a_cancelled_copy_is_awaited_where_it_has_begun_and_never_made_where_not(two: Two, gate: Gate) -> None:
    begun = two.write(list(range(PER_SHARE)))
    assert gate.is_reached.wait(20.0)
    other, waiting = two.write([20]), two.write([21])
    waiting.cancel()
    assert waiting.poll() is TransferState.FAILED
    canceller = threading.Thread(target=begun.cancel)
    canceller.start()
    canceller.join(0.1)
    assert canceller.is_alive(), "the blocks would be given away while they are written"
    gate.is_open.set()
    canceller.join(20.0)
    assert begun.poll() is TransferState.FAILED
    assert begun.failure() == "cancelled"
    finish(two.write([22], b"behind all"))
    assert other.poll() is TransferState.DONE
    assert two.filled() == [*range(PER_SHARE), 20, 22]


def test_a_closed_endpoint_waits_for_what_helpers_have_begun(two: Two, gate: Gate) -> None:
    begun, waiting = two.write(list(range(PER_SHARE))), two.write([21])
    assert gate.is_reached.wait(20.0)
    closer = threading.Thread(target=two.endpoint.close)
    closer.start()
    closer.join(0.1)
    assert closer.is_alive(), "memory would be unmapped under the helper"
    gate.is_open.set()
    closer.join(20.0)
    assert begun.poll() is waiting.poll() is TransferState.FAILED
    assert two.filled() == list(range(PER_SHARE))


def test_a_copy_that_fails_ends_the_endpoint_before_its_notice(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise MemoryError("no room for a table")

    monkeypatch.setattr(CopyPlan, "carry_out_compiled", fails)
    landing = two.receiver.expect("t", range(NUM_BLOCKS))
    failing = two.write(list(range(PER_SHARE)))
    until(lambda: failing.poll() is TransferState.FAILED, what="the helper says so, and lives")
    last = two.write([20], b"all")
    assert last.poll() is TransferState.FAILED
    assert "no room for a table" in two.endpoint.failure()
    until(landing.peer_gone, what="the fence")
    assert landing.poll() == []


def test_without_helpers_everything_is_copied_within_the_write(two: Two) -> None:
    two.sender.transport.close()
    transfer = two.endpoint.write("t", two.sender.blocks(range(9)), two.receiver.blocks(range(9)))
    assert transfer.poll() is TransferState.DONE
    assert two.filled() == list(range(9))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("baton-copy")]
