"""Faults are visible to whoever looks: the digest, the count, the transfer's state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from core.clock import ManualClock
from core.errors import TransferError
from tests.poll import until
from tests.transport.memory import Owned
from tests.transport.peer_process import transport_of
from transport.base import Endpoint, Landing, TransferState
from transport.conformance_pair import finish
from transport.faulty import Faults, FaultyTransport, parse_faults
from transport.schemes import unavailable

SCHEMES: list[Any] = ["inproc", "shm", "zmq", "cuda_ipc"]
SCHEMES += ["nixl"] if not unavailable("nixl") else []
SCHEMES += [pytest.param("ucx", marks=pytest.mark.ucx)] if not unavailable("ucx") else []


@contextmanager
def faulty(
    scheme: str, faults: Faults, clock: ManualClock | None = None
) -> Iterator[tuple[Owned, Owned, Endpoint, Landing]]:
    sender = Owned(FaultyTransport(transport_of(scheme), faults, clock), fill=1)
    receiver = Owned(transport_of(scheme))
    landing = receiver.expect("t", range(8))
    endpoint = sender.transport.connect(receiver.transport.describe())
    try:
        yield sender, receiver, endpoint, landing
    finally:
        endpoint.close()
        sender.transport.close()
        receiver.transport.close()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_flipped_byte_is_seen_by_the_digest_and_only_there(scheme: str) -> None:
    with faulty(scheme, Faults(flip_write=1, flip_byte=4096 + 17)) as (sender, receiver, endpoint, landing):
        transfers = [endpoint.write("t", sender.blocks(ids), receiver.blocks(ids)) for ids in ((0, 1), (4, 2), (6,))]
        finish(*transfers)
        assert landing.num_written() in (None, 5)
        differing = [i for i in (0, 1, 2, 4, 6) if receiver.block(i) != sender.block(i)]
        assert differing == [2]
        assert receiver.block(2)[17] == 0xFE
        assert receiver.digest((0, 1, 2)) != sender.digest((0, 1, 2))
        assert receiver.digest((0, 1)) == sender.digest((0, 1))
        digest = landing.digest()
        assert digest is None or digest != sender.digest((0, 1, 2))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_truncated_write_leaves_the_tail_and_does_not_count(scheme: str) -> None:
    with faulty(scheme, Faults(truncate_write=0)) as (sender, receiver, endpoint, landing):
        finish(endpoint.write("t", sender.blocks([0, 1]), receiver.blocks([0, 1]), b"end"))
        until(lambda: landing.poll() == [b"end"], what="the notice comes nevertheless")
        assert receiver.block(0) == b"\x01" * 4096
        assert receiver.block(1) == b"\x01" * 2048 + b"\x00" * 2048
        assert landing.num_written() in (None, 1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_dropped_write_runs_until_cancelled(scheme: str) -> None:
    with faulty(scheme, Faults(drop_write=0)) as (sender, receiver, endpoint, _):
        dropped = endpoint.write("t", sender.blocks([0]), receiver.blocks([0]))
        finish(endpoint.write("t", sender.blocks([1]), receiver.blocks([1])))
        assert dropped.poll() is TransferState.RUNNING
        dropped.cancel()
        finish(dropped, state=TransferState.FAILED)
        assert receiver.block(0)[0] == 0
        assert receiver.block(1)[0] == 1


def test_a_dropped_write_can_fail_after_some_polls() -> None:
    with faulty("inproc", Faults(drop_write=0, drop_polls=2)) as (sender, receiver, endpoint, _):
        dropped = endpoint.write("t", sender.blocks([0]), receiver.blocks([0]))
        states = [dropped.poll() for _ in range(3)]
        assert states == [TransferState.RUNNING, TransferState.RUNNING, TransferState.FAILED]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_disconnect_fails_the_endpoint_but_not_the_next_one(scheme: str) -> None:
    with faulty(scheme, Faults(disconnect_after=1)) as (sender, receiver, endpoint, _):
        finish(endpoint.write("t", sender.blocks([0]), receiver.blocks([0])))
        finish(endpoint.write("t", sender.blocks([1]), receiver.blocks([1])), state=TransferState.FAILED)
        assert endpoint.failure()
        again = sender.transport.connect(receiver.transport.describe())
        finish(again.write("t", sender.blocks([2]), receiver.blocks([2])))
        again.close()
        assert [receiver.block(i)[0] for i in range(3)] == [1, 0, 1]


def test_a_delay_is_counted_in_polls_and_seconds() -> None:
    clock = ManualClock()
    with faulty("inproc", Faults(delay_polls=2, delay_s=5.0), clock) as (sender, receiver, endpoint, _):
        transfer = endpoint.write("t", sender.blocks([0]), receiver.blocks([0]))
        assert [transfer.poll() for _ in range(4)] == [TransferState.RUNNING] * 4
        clock.advance(6)
        assert transfer.poll() is TransferState.DONE


def test_faults_are_read_from_json_and_unknown_ones_refused() -> None:
    assert parse_faults('{"flip_write": 7}') == Faults(flip_write=7)
    with pytest.raises(TransferError):
        parse_faults('{"flip": 7}')
