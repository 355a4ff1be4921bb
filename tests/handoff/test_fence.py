"""The fence: blocks that may still be written are not given back, whatever the control plane believes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from core.clock import ManualClock
from decode.land import Arm, Drop, LandCommands
from decode.lander import DEAD_PEER_GRACE_S, Lander
from transport.base import Blocks, Endpoint, Landing, Memory, Region
from transport.faultpoint import FaultPoint
from transport.runs import Lane


class OneSidedLanding:
    """Like shm's: it cannot refuse a write, and knows its writer by a connection."""

    def __init__(self) -> None:
        self.is_written = False
        self.is_hung_up = False

    def poll(self) -> list[bytes]:
        return []

    def num_written(self) -> int | None:
        return None

    def digest(self) -> int | None:
        return None

    def peer_gone(self) -> bool:
        return self.is_written and self.is_hung_up

    def has_writer(self) -> bool:
        return self.is_written

    def close(self) -> bool:
        return False


class OneSided:
    """A transport whose one landing the test moves by hand."""

    scheme = "shm"

    def __init__(self) -> None:
        self.landing = OneSidedLanding()

    def allocate(self, num_bytes: int) -> Memory | None:
        return None

    def register(self, region: Region) -> None: ...

    def describe(self) -> bytes:
        return b""

    def connect(self, description: bytes) -> Endpoint:
        raise NotImplementedError

    def expect(self, tag: str, blocks: Sequence[Blocks]) -> Landing:
        return self.landing

    def close(self) -> None: ...


class House:
    """A lander with one armed hand-off whose peer is believed dead."""

    def __init__(self, *, is_written: bool) -> None:
        self.clock = ManualClock()
        self.transport = OneSided()
        self.memory = ctypes.create_string_buffer(4096)
        region = Region(0, ctypes.addressof(self.memory), 1024, 1024, 4)
        self.lander = Lander({"shm": self.transport}, [region], self.clock, FaultPoint())
        self.lander.begin_step(LandCommands(arm=[Arm("a", "request", [0, 1], False, [Lane(0, 0, 0, 0, 1024)])]))
        self.lander.end_step()
        self.transport.landing.is_written = is_written
        self.drop(peer_dead=True)

    def drop(self, *, peer_dead: bool = False, fenced: bool = False) -> None:
        self.lander.begin_step(LandCommands(drop=[Drop("a", fenced, "died", peer_dead)]))

    def is_lost(self) -> bool:
        return bool(self.lander.end_step().lost)


def test_a_broken_control_connection_does_not_free_blocks_whose_writer_lives() -> None:
    house = House(is_written=True)
    for _ in range(20):
        house.clock.advance(DEAD_PEER_GRACE_S)
        assert not house.is_lost()
    house.transport.landing.is_hung_up = True
    assert house.is_lost()


def test_the_writers_own_word_is_enough() -> None:
    house = House(is_written=True)
    house.drop(fenced=True)
    assert house.is_lost()


def test_a_sender_that_had_not_begun_is_given_its_grace_and_no_more() -> None:
    house = House(is_written=False)
    assert not house.is_lost()
    house.clock.advance(DEAD_PEER_GRACE_S + 0.1)
    assert house.is_lost()
