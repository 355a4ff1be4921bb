"""What the hand-off logic needs from outside: how to speak, to wake its engine, to report, and what time it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from core.clock import Clock
from core.handoff import Peer
from core.report import Report
from transport.faultpoint import FaultPoint
from transport.messages import Message


@dataclass(frozen=True)
class Ports:
    """send: one message to one peer, without waiting; False if it could not be queued. wake: ends the engine's idle
    sleep. report: tells the proxy what was done for one request."""

    send: Callable[[Peer, Message], bool]
    wake: Callable[[], None]
    report: Callable[[Report], None]
    clock: Clock
    faults: FaultPoint
