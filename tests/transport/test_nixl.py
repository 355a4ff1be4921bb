"""NIXL between processes: what happens when either side dies, and what is refused."""

from __future__ import annotations

import pytest

from transport.conformance import check_transport
from transport.faulty import Faults, FaultyTransport
from transport.nixl import NixlTransport, unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())


def make() -> NixlTransport:
    return NixlTransport("127.0.0.1")


def test_it_does_what_every_transport_must() -> None:
    check_transport(make)


def test_it_still_does_when_completion_is_delayed() -> None:
    check_transport(lambda: FaultyTransport(make(), Faults(delay_polls=3, delay_s=0.002)))
