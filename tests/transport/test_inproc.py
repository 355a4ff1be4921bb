"""The reference transport."""

from __future__ import annotations

import pytest

from core.errors import TransferError
from tests.transport.memory import Owned
from transport.base import TransferState
from transport.conformance import check_transport
from transport.faulty import Faults, FaultyTransport
from transport.inproc import InprocTransport


def test_it_does_what_every_transport_must() -> None:
    check_transport(InprocTransport)


def test_it_still_does_when_completion_is_delayed() -> None:
    check_transport(lambda: FaultyTransport(InprocTransport(), Faults(delay_polls=3, delay_s=0.002)))


def test_a_closed_receiver_fails_its_writers_and_cannot_be_connected_to() -> None:
    sender, receiver = Owned(InprocTransport(), fill=1), Owned(InprocTransport())
    endpoint = sender.transport.connect(receiver.transport.describe())
    receiver.expect("t", [0])
    receiver.transport.close()
    assert endpoint.write("t", sender.blocks([0]), receiver.blocks([0])).poll() is TransferState.FAILED
    assert endpoint.failure()
    assert receiver.block(0)[0] == 0
    with pytest.raises(TransferError):
        sender.transport.connect(receiver.transport.describe())
    sender.transport.close()
