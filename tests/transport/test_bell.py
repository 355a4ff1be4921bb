"""A bell between processes: it is heard from another one, not from strangers, and leaves nothing behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from tests.poll import until
from tests.transport.peer_process import ROOT
from transport.bell import Bell, Ringer

RING = """
import os, sys
from transport.bell import Ringer
{}
ringer = Ringer()
ringer.ring(sys.argv[1])
ringer.close()
"""


class Counted:
    def __init__(self) -> None:
        self.num_rings = 0
        self.bell = Bell(self._rung)

    def _rung(self) -> None:
        self.num_rings += 1


@pytest.fixture
def counted() -> Iterator[Counted]:
    counted = Counted()
    yield counted
    counted.bell.close()


def ring_from_a_process(name: str, first: str = "pass") -> None:
    subprocess.run([sys.executable, "-c", RING.format(first), name], cwd=ROOT, check=True)


def test_it_is_heard_from_another_process_each_time(counted: Counted) -> None:
    for turn in (1, 2):
        ring_from_a_process(counted.bell.name)
        until(lambda turn=turn: counted.num_rings == turn, what="the ring")  # type: ignore[misc]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_is_not_heard(counted: Counted) -> None:
    ring_from_a_process(counted.bell.name, "os.setuid(65534)")
    ring_from_a_process(counted.bell.name)
    until(lambda: counted.num_rings, what="our own ring, which came later")
    assert counted.num_rings == 1


def test_what_is_said_does_not_matter_and_who_rings_too_often_does_not_wait(counted: Counted) -> None:
    ringer = Ringer()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.sendto(b"x" * 10_000, f"\0{counted.bell.name}")
        until(lambda: counted.num_rings == 1, what="a ring with words")
    for _ in range(2000):
        ringer.ring(counted.bell.name)
    until(lambda: counted.num_rings > 1, what="some of the rings")
    ringer.close()


def test_nobody_hears_it_after_its_end_and_nothing_is_left() -> None:
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    bell = Bell(lambda: pytest.fail("it was rung"))
    ringer = Ringer()
    bell.close()
    bell.close()
    ringer.ring(bell.name)
    ringer.close()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before
