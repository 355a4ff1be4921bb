"""A transport that knows nothing of GPUs, in a device's memory: it moves what has been computed, and not before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.poll import until
from tests.transport.memory import Owned, connected
from transport import nixl
from transport.base import Endpoint, TransferState, Transport
from transport.behind import BehindComputation
from transport.conformance import check_transport
from transport.conformance_pair import finish
from transport.host_device import HostDevice
from transport.schemes import make_transport, unavailable

needs_nixl = pytest.mark.skipif(bool(nixl.unavailable()), reason=nixl.unavailable())
needs_ucx = pytest.mark.skipif(bool(unavailable("ucx")), reason=unavailable("ucx"))
SCHEMES = ["zmq", pytest.param("nixl", marks=needs_nixl), pytest.param("ucx", marks=[pytest.mark.ucx, needs_ucx])]


def behind(scheme: str, device: HostDevice | None = None) -> BehindComputation:
    return BehindComputation(make_transport(scheme, "127.0.0.1"), device or HostDevice())


@contextmanager
def pair(device: HostDevice) -> Iterator[tuple[Owned, Owned, Endpoint]]:
    """See `connected`; one block has been moved. device: the sender's."""
    with connected(behind("zmq", device), behind("zmq")) as (sender, receiver, endpoint):
        landing = receiver.expect("first", [7])
        finish(endpoint.write("first", sender.blocks([7]), receiver.blocks([7])))
        landing.close()
        yield sender, receiver, endpoint


@pytest.mark.parametrize("scheme", SCHEMES)
def test_passes_the_check_of_every_transport(scheme: str) -> None:
    def make() -> Transport:
        return behind(scheme)

    check_transport(make)


def test_moves_what_was_computed_and_tells_of_it_behind_the_data() -> None:
    device = HostDevice()
    with pair(device) as (sender, receiver, endpoint):
        landing = receiver.expect("tag", [0, 1])
        device.hold()
        early = endpoint.write("tag", sender.blocks([0]), receiver.blocks([0]))
        late = endpoint.write("tag", sender.blocks([1]), receiver.blocks([1]), b"all there")
        sender.put(0, b"\2" * 4096)  # what the device computes meanwhile
        assert (early.poll(), late.poll(), landing.poll()) == (TransferState.RUNNING, TransferState.RUNNING, [])
        assert receiver.block(0) == b"\0" * 4096
        device.let_go()
        notices = until(landing.poll, what="the notice")  # nobody polls the writes
        assert notices == [b"all there"]
        assert (receiver.block(0), receiver.block(1)) == (b"\2" * 4096, b"\1" * 4096)
        finish(early)
        finish(late)


def test_what_is_cancelled_while_it_waits_never_moves() -> None:
    device = HostDevice()
    with pair(device) as (sender, receiver, endpoint):
        landing = receiver.expect("tag", [0, 1])
        device.hold()
        dropped = endpoint.write("tag", sender.blocks([0]), receiver.blocks([0]))
        kept = endpoint.write("tag", sender.blocks([1]), receiver.blocks([1]), b"done")
        dropped.cancel()
        assert dropped.poll() is TransferState.FAILED
        device.let_go()
        finish(kept)
        until(landing.poll, what="the notice")
        assert receiver.block(0) == b"\0" * 4096


def test_closing_ends_what_waits() -> None:
    device = HostDevice()
    with pair(device) as (sender, receiver, endpoint):
        receiver.expect("tag", [0])
        device.hold()
        write = endpoint.write("tag", sender.blocks([0]), receiver.blocks([0]))
        endpoint.close()
        device.let_go()
        assert write.poll() is TransferState.FAILED
        assert "closed" in write.failure()
        assert receiver.block(0) == b"\0" * 4096


def test_a_device_that_fails_ends_what_waits_with_its_reason() -> None:
    device = HostDevice()
    with pair(device) as (sender, receiver, endpoint):
        device.hold()
        write = endpoint.write("tag", sender.blocks([0]), receiver.blocks([0]))
        device.fail("the device fell off the bus")
        assert write.poll() is TransferState.FAILED
        assert "fell off" in write.failure()


def test_a_write_that_does_not_fit_is_refused_when_it_begins() -> None:
    device = HostDevice()
    with pair(device) as (sender, receiver, endpoint):
        device.hold()
        write = endpoint.write("tag", sender.blocks([0]), receiver.blocks([99]))
        device.let_go()
        until(lambda: write.poll() is TransferState.FAILED, what="the refusal")
        assert "99" in write.failure() or "outside" in write.failure()
