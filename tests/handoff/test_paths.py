"""Which path a sender takes: measured, remembered by boot id, left when it fails, taken again when a probe succeeds."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from core.clock import ManualClock, SystemClock
from core.errors import TransferError
from core.handoff import Peer
from core.path import Path, PathState
from decode.land import Arm, Check, Drop, LandCommands
from decode.lander import Lander
from prefill.connections import BACKOFF_S, FORGET_AFTER_S, MAX_LOST_WRITES, MAX_RECEIVERS, Connections
from prefill.peer_paths import Far
from prefill.prober import Prober, probe
from prefill.push import PushChunk, PushCommands, Pushed, PushResults, PushTarget, Quiet
from prefill.pusher import PagedCache, Pusher
from tests.poll import until
from transport.base import Region, Transport
from transport.door import Await, Door, DoorKey, Meet, Named, News
from transport.faultpoint import FaultPoint
from transport.faulty import Faults, FaultyTransport
from transport.guarded import GuardedTransport
from transport.runs import Lane
from transport.schemes import make_transport
from transport.scratch import Scratch, ScratchLandings
from transport.shm_wire import ShmDescription, encode_description, host_id

LAYERS, BLOCKS, BLOCK_BYTES, BLOCK_SIZE = 3, 16, 4096, 4
ME, PEER = "boot-p", Peer("d", "tcp://127.0.0.1:1", "boot-d")
SOMEBODY_ELSES = encode_description(ShmDescription(host_id(), os.getuid() + 1, "socket", [], []))
FAILED, CHOSEN, STANDBY = PathState.FAILED, PathState.CHOSEN, PathState.STANDBY


class Worker:
    """One worker's memory and transports, as `engine/worker_side` puts them together."""

    def __init__(self, fill: int, faults: dict[str, Faults] | None = None) -> None:
        self.transports: dict[str, Transport] = {}
        for scheme in ("shm", "zmq"):
            plain = make_transport(scheme, "127.0.0.1")
            mine = (faults or {}).get(scheme)
            self.transports[scheme] = GuardedTransport(FaultyTransport(plain, mine) if mine else plain)
        num_bytes = LAYERS * BLOCKS * BLOCK_BYTES
        self.memory = next(m for t in self.transports.values() if (m := t.allocate(num_bytes)) is not None)
        ctypes.memset(self.memory.address, fill, num_bytes)
        self.regions = [
            Region(layer, self.memory.address + layer * BLOCKS * BLOCK_BYTES, BLOCK_BYTES, BLOCK_BYTES, BLOCKS)
            for layer in range(LAYERS)
        ]
        for transport in self.transports.values():
            for region in self.regions:
                transport.register(region)
        self.scratch = Scratch(self.transports)
        self.landings = ScratchLandings(self.transports)
        self.offers = [(scheme, transport.describe()) for scheme, transport in self.transports.items()]

    def block(self, layer: int, block: int) -> bytes:
        return ctypes.string_at(self.regions[layer].address + block * BLOCK_BYTES, BLOCK_BYTES)

    def close(self) -> None:
        self.landings.close()
        while self.transports:
            self.transports.popitem()[1].close()


class House:
    """A receiver, and a sender that knows it. `faults`: of the sender's transports."""

    def __init__(self, faults: dict[str, Faults] | None = None) -> None:
        self.clock = ManualClock()
        self.near, self.far = Worker(1, faults), Worker(2)
        self.far.landings.expect(ME)
        self.connections = Connections(self.near.transports, self.clock)

    def probe(self) -> None:
        self.connections.greet(PEER, self.far.offers)
        for far in self.connections.due():
            probe(self.connections, far, ME, SystemClock())

    def scheme(self) -> str:
        return self.connections.pick(PEER, self.far.offers).scheme

    def paths(self) -> dict[str, Path]:
        return {path.transport: path for path in self.connections.news(-1)[1]}

    def states(self) -> dict[str, PathState]:
        return {scheme: path.state for scheme, path in self.paths().items()}

    def close(self) -> None:
        self.connections.close()
        self.near.close()
        self.far.close()


@pytest.fixture
def house() -> Iterator[House]:
    made = House()
    yield made
    made.close()


@pytest.fixture
def slow_shm() -> Iterator[House]:
    made = House({"shm": Faults(delay_s=0.5)})
    yield made
    made.close()


def test_before_it_is_measured_the_first_offer_is_taken_and_then_the_fastest(slow_shm: House) -> None:
    assert slow_shm.scheme() == "shm"
    assert slow_shm.connections.due() == [], "a peer that does not expect it is not probed"
    slow_shm.probe()
    assert slow_shm.scheme() == "zmq"
    paths = slow_shm.paths()
    assert (paths["shm"].state, paths["zmq"].state) == (STANDBY, CHOSEN)
    assert paths["zmq"].write_gb_per_s > paths["shm"].write_gb_per_s == 0.0, "which moved nothing in time"
    assert slow_shm.connections.due() == [], "what is measured is remembered"


def test_a_peer_that_was_started_anew_is_measured_anew(slow_shm: House) -> None:
    slow_shm.probe()
    again = Peer(PEER.name, PEER.control, "another boot")
    slow_shm.connections.greet(again, slow_shm.far.offers)
    assert slow_shm.connections.due() == [Far(again.boot_id)]
    assert slow_shm.connections.pick(again, slow_shm.far.offers).scheme == "shm"
    slow_shm.connections.forget(again.boot_id)
    assert slow_shm.scheme() == "zmq"


def test_ranks_of_one_peer_are_measured_apart_and_forgotten_together(slow_shm: House) -> None:
    slow_shm.probe()
    slow_shm.connections.greet(PEER, slow_shm.far.offers, rank=1)
    assert slow_shm.connections.due() == [Far(PEER.boot_id, 1)]
    assert slow_shm.connections.pick(PEER, slow_shm.far.offers, rank=1).scheme == "shm"
    assert slow_shm.scheme() == "zmq"
    slow_shm.connections.forget(PEER.boot_id)
    assert slow_shm.connections.num_endpoints() == 0


def test_a_failed_path_is_left_until_a_probe_succeeds_and_each_time_for_longer(house: House) -> None:
    house.probe()
    assert house.scheme() == "shm"
    for times in (1, 2):
        way = house.connections.pick(PEER, house.far.offers)
        way.endpoint.close()
        assert house.connections.lost_write(way, "broken")
        assert house.connections.lost_write(way, "the same failure, seen by another hand-off")
        assert house.scheme() == "zmq"
        assert (house.paths()["shm"].state, house.paths()["shm"].num_failures) == (FAILED, times)
        assert house.paths()["shm"].why == "broken"
        house.clock.advance(BACKOFF_S * 2 ** (times - 1) - 1)
        assert house.connections.due() == []
        house.clock.advance(2)
        house.probe()
        assert house.scheme() == "shm"


def test_one_lost_write_is_not_the_paths_fault_but_several_are(house: House) -> None:
    house.probe()
    for turn in range(MAX_LOST_WRITES):
        way = house.connections.pick(PEER, house.far.offers)
        assert house.connections.lost_write(way, "refused") == (turn == MAX_LOST_WRITES - 1)
        if turn == 0:
            house.connections.wrote(way)
            assert not house.connections.lost_write(way, "refused")
    assert house.scheme() == "zmq"


def test_when_everything_has_failed_the_one_that_failed_first_is_tried_again(house: House) -> None:
    for scheme in ("shm", "zmq"):
        way = house.connections.pick(PEER, house.far.offers)
        assert way.scheme == scheme
        way.endpoint.close()
        house.connections.lost_write(way, "broken")
        house.clock.advance(1)
    assert house.scheme() == "shm"
    house.connections.wrote(house.connections.pick(PEER, house.far.offers))
    assert house.states() == {"shm": CHOSEN, "zmq": FAILED}
    with pytest.raises(TransferError, match="every transport to d has failed: shm, zmq"):
        house.connections.pick(PEER, house.far.offers, ["shm", "zmq"])


def test_greetings_without_end_are_bounded(house: House) -> None:
    for index in range(MAX_RECEIVERS):
        house.connections.greet(Peer("d", PEER.control, f"boot {index}"), house.far.offers)
    with pytest.raises(TransferError, match="no more are measured"):
        house.connections.greet(PEER, house.far.offers)
    house.connections.greet(Peer("d", PEER.control, "boot 0"), house.far.offers)
    assert house.scheme() == "shm", "a hand-off still finds its way"


def test_a_path_that_cannot_even_be_opened_is_passed_over(house: House) -> None:
    """Its description is of this host, so it is tried, and does not fit what connecting needs."""
    offers = [("shm", SOMEBODY_ELSES), *house.far.offers[1:]]
    assert house.connections.pick(PEER, offers).scheme == "zmq"
    assert house.states() == {"shm": FAILED, "zmq": CHOSEN}
    assert "runs as user" in house.paths()["shm"].why


def test_a_peer_that_died_unnoticed_is_seen_and_forgotten(house: House) -> None:
    """No hand-off has ever gone there, so no message tells of its end, and its memory must not stay mapped."""
    house.probe()
    assert house.connections.num_endpoints() == 2
    house.far.close()

    def is_closed() -> bool:
        house.connections.sweep()
        return house.connections.num_endpoints() == 0

    until(is_closed, 10.0, "its paths are closed")
    house.clock.advance(FORGET_AFTER_S + 1)
    house.connections.sweep()
    assert house.paths() == {}


def test_the_prober_introduces_measures_and_tells() -> None:
    """Two workers that have never stepped, each behind its door."""
    near, far = Worker(1), Worker(2)
    connections = [Connections(worker.transports, SystemClock()) for worker in (near, far)]
    doors = [Door(), Door()]
    probers = [
        Prober(each, worker.landings, door, SystemClock())
        for each, worker, door in zip(connections, (near, far), doors, strict=True)
    ]
    key, other = (DoorKey(door.address) for door in doors)
    key.say(Named(ME))
    other.say(Named(PEER.boot_id))
    other.say(Await(ME))
    key.say(Meet(PEER, far.offers))
    heard: list[Any] = []

    def measured() -> bool:
        heard.extend(word for word in key.listen() if isinstance(word, News))
        return (
            bool(heard)
            and len(heard[-1].paths) == 2
            and all(path.why != "not measured yet" for path in heard[-1].paths)
        )

    until(measured, 20.0, "news of both paths")
    assert sum(path.state is CHOSEN for path in heard[-1].paths) == 1
    for each, prober, half in zip(connections, probers, (key, other), strict=True):
        each.close()
        prober.close()
        half.close()
    near.close()
    far.close()
    until(lambda: not [t for t in threading.enumerate() if t.name == "baton-probe"], 5.0, "its thread ends")


# ---- a hand-off whose path fails ----


class HandOff:
    """Four blocks of three layers, from the sender's blocks 0..3 into the receiver's blocks 8..11."""

    def __init__(self, house: House, id_: str = "h") -> None:
        self.house, self.id = house, id_
        clock, faults = house.clock, FaultPoint()
        self.pusher = Pusher(house.connections, PagedCache(house.near.regions, BLOCK_SIZE), clock, faults)
        self.lander = Lander(house.far.transports, house.far.regions, clock, faults)
        lane = Lane(0, 0, 0, 0, BLOCK_BYTES)
        self.lander.begin_step(LandCommands(arm=[Arm(id_, "request", [8, 9, 10, 11], False, [lane])]))
        self.target = PushTarget(PEER, house.far.offers, 0, 16, [8, 9, 10, 11], False, lane)
        self.ended = PushResults()

    def step(self, num_tokens: int) -> None:
        """One forward pass, after which so many tokens are computed."""
        chunk = PushChunk(self.id, self.target, num_tokens, [0, 1, 2, 3], 0)
        self.pusher.begin_step(PushCommands([chunk]))
        for layer in range(LAYERS):
            self.pusher.save_layer(layer)
        self.pusher.sweep()
        self.settle()

    def settle(self) -> PushResults:
        """What has ended so far."""
        results = self.pusher.end_step()
        self.ended.pushed += results.pushed
        self.ended.failed += results.failed
        self.ended.quiet += results.quiet
        return self.ended

    def land(self, pushed: Pushed) -> bool:
        """Whether the receiver finds what the sender says."""
        full = pushed.scheme != "shm"
        check = Check(self.id, [pushed.part()], full)
        self.lander.begin_step(LandCommands(check=[check]))
        ended: list[Any] = []

        def has_ended() -> bool:
            results = self.lander.end_step()
            assert not results.lost, results.lost
            ended.extend(results.received)
            return bool(ended)

        return until(has_ended, 10.0, "it is received")


@pytest.mark.parametrize("after", range(2 * LAYERS))
def test_a_path_that_fails_at_any_write_costs_the_hand_off_nothing(after: int) -> None:
    """Two chunks of three layers over shm, which breaks before write `after`; everything goes again over zmq."""
    house = House({"shm": Faults(disconnect_after=after)})
    try:
        hand_off = HandOff(house)
        hand_off.step(8)
        hand_off.step(16)
        pushed = until(lambda: hand_off.settle().pushed, 20.0, "everything is pushed")
        assert (pushed[0].scheme, pushed[0].num_pairs) == ("zmq", 4 * LAYERS)
        assert pushed[0].why_rerouted == "shm failed: disconnected by a fault"
        assert hand_off.land(pushed[0])
        for layer in range(LAYERS):
            assert {house.far.block(layer, i)[0] for i in range(8, 12)} == {1}
            assert {house.far.block(layer, i)[0] for i in range(8)} == {2}, "only its own blocks were written"
        assert house.scheme() == "zmq"
    finally:
        house.close()


def test_where_no_other_path_is_left_the_hand_off_fails_as_before() -> None:
    house = House({scheme: Faults(disconnect_after=0) for scheme in ("shm", "zmq")})
    try:
        hand_off = HandOff(house)
        hand_off.step(16)
        results = hand_off.settle()
        assert [failure.why for failure in results.failed] == ["disconnected by a fault"]
        hand_off.pusher.begin_step(PushCommands(stop=["h"]))
        assert hand_off.settle().quiet == [Quiet("h", 0)]
    finally:
        house.close()


def test_a_hand_off_that_was_stopped_is_not_begun_again() -> None:
    house = House({"shm": Faults(disconnect_after=0, delay_polls=0)})
    try:
        hand_off = HandOff(house)
        chunk = PushChunk("h", hand_off.target, 16, [0, 1, 2, 3], 0)
        hand_off.pusher.begin_step(PushCommands([chunk]))
        hand_off.pusher.save_layer(0)
        hand_off.pusher.begin_step(PushCommands(stop=["h"]))
        results = hand_off.pusher.end_step()
        assert (results.pushed, results.failed, results.quiet) == ([], [], [Quiet("h", 0)])
        assert hand_off.pusher.num_in_flight() == 0
    finally:
        house.close()


def test_what_a_given_up_hand_off_has_sent_finds_no_open_landing(house: House) -> None:
    """The sender's word that it stopped ends the hand-off; over TCP bytes of it may still be on their way."""
    hand_off = HandOff(house)
    hand_off.lander.begin_step(LandCommands(drop=[Drop("h", fenced=True, why="given up")]))
    assert [lost.why for lost in hand_off.lander.end_step().lost] == ["given up"]
    late = msgspec.structs.replace(hand_off.target, schemes=house.far.offers[1:])
    hand_off.target = late
    hand_off.step(16)
    until(lambda: hand_off.settle().failed, 10.0, "late writes are refused")
    assert house.far.block(0, 8)[0] == 2
