"""Measuring a path: between scratch regions alone, in bounded time, and a slow path is seen to be slow."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from core.clock import SystemClock
from core.errors import TransferError
from tests.transport.memory import Owned
from transport.base import Blocks, Endpoint, Transport
from transport.choose import fastest
from transport.conformance_pair import finish
from transport.faulty import Faults, FaultyTransport
from transport.guarded import GuardedTransport
from transport.probe import ROUND_BYTES, Measurement, measure, wait_ready
from transport.schemes import make_transport
from transport.scratch import NUM_SCRATCH_BLOCKS, SCRATCH_REGION, Scratch, ScratchLandings, probe_tag

CLOCK = SystemClock()
TAG = probe_tag("p")
ALL = Blocks(SCRATCH_REGION, tuple(range(NUM_SCRATCH_BLOCKS)))


class Side:
    """A transport with a KV region full of `fill`, and its scratch memory."""

    def __init__(self, scheme: str, fill: int, faults: Faults | None = None) -> None:
        plain = make_transport(scheme, "127.0.0.1")
        self.transport: Transport = GuardedTransport(FaultyTransport(plain, faults) if faults else plain)
        self.owned = Owned(self.transport, fill=fill)
        self.scratch = Scratch({scheme: self.transport})
        self.landings = ScratchLandings({scheme: self.transport})


@contextmanager
def path(scheme: str, faults: Faults | None = None) -> Iterator[tuple[Side, Side, Endpoint]]:
    with ExitStack() as stack:
        near, far = Side(scheme, 1, faults), Side(scheme, 2)
        for side in (near, far):
            stack.callback(side.transport.close)
            stack.callback(side.landings.close)
        far.landings.expect("p")
        endpoint = near.transport.connect(far.transport.describe())
        stack.callback(endpoint.close)
        yield near, far, endpoint


@pytest.mark.parametrize("scheme", ["inproc", "shm", "zmq"])
def test_both_directions_are_measured_and_no_block_of_the_cache_is_touched(scheme: str) -> None:
    with path(scheme) as (near, far, endpoint):
        wait_ready(endpoint, TAG, CLOCK)
        begun_s = time.monotonic()
        measured = measure(endpoint, TAG, CLOCK, 5.0)
        assert 0 < measured.latency_s < time.monotonic() - begun_s
        assert measured.write_gb_per_s == ROUND_BYTES / measured.write_s / 1e9 > 0
        assert measured.read_gb_per_s > 0
        assert {near.owned.block(i)[0] for i in range(8)} == {1}
        assert {far.owned.block(i)[0] for i in range(8)} == {2}


def test_a_slowed_shm_measures_slower_than_zmq() -> None:
    measured = {}
    for scheme, faults in (("shm", Faults(delay_s=0.5)), ("zmq", None)):
        with path(scheme, faults) as (_, _, endpoint):
            wait_ready(endpoint, TAG, CLOCK)
            measured[scheme] = measure(endpoint, TAG, CLOCK, 5.0)
            assert measured[scheme].write_s >= (0.5 if faults else 0.0)
    assert fastest(["shm", "zmq"], measured) == "zmq"


def test_a_path_that_moves_nothing_in_time_is_measured_as_that() -> None:
    with path("inproc", Faults(delay_s=30.0)) as (_, _, endpoint):
        begun_s = time.monotonic()
        measured = measure(endpoint, TAG, CLOCK, 0.05)
        assert measured == Measurement(0.0, 0.0, 0.0)
        assert measured.write_gb_per_s == 0.0
        assert time.monotonic() - begun_s < 5.0
        with pytest.raises(TransferError, match="nothing arrived within 0 s"):
            wait_ready(endpoint, TAG, CLOCK, 0.01)


def test_a_path_that_breaks_says_why() -> None:
    with path("zmq") as (_, far, endpoint):
        wait_ready(endpoint, TAG, CLOCK)
        far.transport.close()
        with pytest.raises(TransferError):
            measure(endpoint, TAG, CLOCK, 20.0)


def test_two_probers_at_once_do_not_disturb_each_other() -> None:
    with path("zmq") as (_, far, endpoint):
        far.landings.expect("q")
        far.landings.expect("q")
        other = Side("zmq", 3)
        second = other.transport.connect(far.transport.describe())
        transfers = [
            each.write(tag, blocks, blocks)
            for _ in range(20)
            for each, tag, blocks in ((endpoint, TAG, ALL), (second, probe_tag("q"), ALL))
        ]
        finish(*transfers)
        second.close()
        other.transport.close()


def test_who_was_not_announced_may_not_write() -> None:
    with path("zmq") as (_, far, endpoint):
        far.landings.close()
        with pytest.raises(TransferError, match="nothing is expected"):
            wait_ready(endpoint, TAG, CLOCK)


def test_a_near_tie_is_decided_by_preference_and_a_path_that_did_not_end_comes_last() -> None:
    def took(write_s: float) -> Measurement:
        return Measurement(1e-4, write_s, write_s)

    order = ["shm", "nixl", "zmq"]
    assert fastest(order, {}) == "shm"
    assert fastest(order, {"shm": took(1.2), "nixl": took(1.0)}) == "shm"
    assert fastest(order, {"shm": took(1.3), "nixl": took(1.0)}) == "nixl"
    assert fastest(order, {"zmq": took(1.0)}) == "zmq", "what was measured goes before what was not"
    assert fastest(order, {"shm": took(0.0), "zmq": took(1.0)}) == "zmq"
    assert fastest(order, {"shm": took(0.0), "zmq": took(0.0)}) == "shm"
