"""Instances are introduced rank by rank: who awaits probes, who is told to measure whom, what is known afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from core.clock import ManualClock
from core.handoff import Peer
from core.layout import KVLayout
from core.path import Path, PathState
from engine.acquaintances import GREET_AGAIN_S, Acquaintances, OwnRank
from tests.poll import until
from transport.door import Await, Door, Meet, Named, News, Word
from transport.messages import Greeting, Message

LAYOUT = KVLayout("model", "float32", 2, 4, 64, 16, 65536, "LBHNC", "vec")
ME = Peer("me", "tcp://127.0.0.1:1", "boot-me", 2)
PEER = Peer("peer", "tcp://127.0.0.1:2", "boot-peer", 4)
SCHEMES = [("zmq", b"description")]


class Instance:
    """Two ranks' doors, and what is sent to peers."""

    def __init__(self) -> None:
        self.doors = [Door(), Door()]
        self.sent: list[tuple[Peer, Message]] = []
        self.clock = ManualClock()
        ranks = [OwnRank([("zmq", b"of rank %d" % rank)], door.address) for rank, door in enumerate(self.doors)]
        self.acquaintances = Acquaintances(ME, LAYOUT, ranks, self._send, self.clock)
        self.hear()

    def hear(self) -> list[list[Word]]:
        """What each rank has been told since the last time."""
        return [door.hear(0.2) + door.hear(0.0) for door in self.doors]

    def num_paths(self) -> int:
        self.acquaintances.tick()
        return len(self.acquaintances.paths())

    def close(self) -> None:
        self.acquaintances.close()
        for door in self.doors:
            door.close()

    def _send(self, peer: Peer, message: Message) -> bool:
        self.sent.append((peer, message))
        return True


@pytest.fixture
def instance() -> Iterator[Instance]:
    instance = Instance()
    yield instance
    instance.close()


def test_every_rank_awaits_probes_and_a_greeting_names_them_all(instance: Instance) -> None:
    instance.acquaintances.on_peers([PEER])
    assert instance.hear() == [[Await("boot-peer")]] * 2
    assert instance.sent == [(PEER, Greeting([[("zmq", b"of rank 0")], [("zmq", b"of rank 1")]]))]
    instance.acquaintances.on_peers([PEER])
    assert len(instance.sent) == 1, "once is enough for a while"
    instance.clock.advance(GREET_AGAIN_S)
    instance.acquaintances.on_peers([PEER])
    assert len(instance.sent) == 2


def test_each_rank_measures_the_ranks_that_it_writes_to(instance: Instance) -> None:
    theirs = [[("zmq", b"of their rank %d" % rank)] for rank in range(4)]
    instance.acquaintances.on_greeting(PEER, Greeting(theirs))
    assert instance.hear() == [
        [Meet(PEER, theirs[0], 0), Meet(PEER, theirs[1], 1)],
        [Meet(PEER, theirs[2], 2), Meet(PEER, theirs[3], 3)],
    ]


def test_sizes_that_do_not_fit_are_not_measured(instance: Instance) -> None:
    instance.acquaintances.on_greeting(PEER, Greeting([SCHEMES] * 3))
    assert instance.hear() == [[], []]


def test_what_the_ranks_say_stands_side_by_side(instance: Instance) -> None:
    path = Path("peer", "boot-peer", "zmq", PathState.CHOSEN)
    for rank, door in enumerate(instance.doors):
        door.say(News(True, [msgspec.structs.replace(path, receiver_rank=2 * rank)]))
    until(lambda: instance.num_paths() == 2, what="news")
    instance.doors[1].say(News(True, []))
    until(lambda: instance.num_paths() == 1, what="news")
    assert instance.acquaintances.paths() == [path], "the other rank's table is its own"


def test_a_worker_that_cannot_be_reached_leaves_paths_unmeasured() -> None:
    acquaintances = Acquaintances(ME, LAYOUT, [OwnRank(SCHEMES, "")], lambda *_: True, ManualClock())
    acquaintances.on_peers([PEER])
    acquaintances.tick()
    assert acquaintances.paths() == []
    acquaintances.close()


def test_a_worker_is_told_who_it_belongs_to() -> None:
    door = Door()
    acquaintances = Acquaintances(ME, LAYOUT, [OwnRank(SCHEMES, door.address)], lambda *_: True, ManualClock())
    assert door.hear(1.0) + door.hear(0.1) == [Named("boot-me")]
    acquaintances.close()
    door.close()
