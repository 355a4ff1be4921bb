"""Labels: the blocks of a prompt are listed by name, outlive others while pinned, and leave when their time is over."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from core.clock import ManualClock
from core.errors import Overloaded, ProtocolError
from core.handoff import PARAMS_KEY, Handoff, Label, Peer, handoff_from_params
from kvcache import labels as module
from kvcache import wire
from kvcache.client import CacheClient, ask_figures, drop_all, drop_label, labels, pin_label
from kvcache.index import Index
from kvcache.keys import join_keys, tenant_of
from kvcache.label_notes import LabelNotes
from kvcache.labels import PINNED_SHARE, UNSEEN_S, Labels, Named
from kvcache.ranges import ALIGNMENT
from tests.kvcache.local_server import LocalServer, serving_here
from tests.kvcache.memory_tier import MemoryTier
from tests.kvcache.places import BLOCK_BYTES, key, ledger_of
from tests.kvcache.test_server import answer, chain
from tests.poll import until
from transport.mapping import Mapping, make_memfd

CAPACITY = 12 * ALIGNMENT
HALF = 4096
ALICE, BOB = tenant_of("alice"), tenant_of("bob")


class Stage:
    """An index of twelve small blocks and its labels."""

    def __init__(self, notes: LabelNotes | None = None, clock: ManualClock | None = None) -> None:
        self.clock = clock or ManualClock()
        ledger, self.memory = ledger_of(CAPACITY)
        self.index = Index(CAPACITY, ledger, self.clock)
        self.labels = Labels(self.index, self.clock, notes)

    def store(self, *numbers: int) -> None:
        for number in numbers:
            for _, offset in self.index.reserve(1, [key(number)], ALIGNMENT):
                assert self.index.commit(1, key(number), offset, number)

    def name(self, label: Label, *numbers: int, tenant: bytes = b"") -> None:
        self.labels.name(label, Named(tenant, tuple(key(n) for n in numbers), ALIGNMENT, 16 * len(numbers)))

    def there(self, *numbers: int) -> list[int]:
        return [number for number in numbers if self.index.complete.get(key(number)) is not None]

    def shown(self) -> dict[str, tuple[int, int, bool]]:
        return {label.name: (label.blocks, label.num_blocks, label.pinned) for label in self.labels.figures()}


def test_a_label_names_blocks_that_come_later_and_pins_them_then() -> None:
    stage = Stage()
    stage.name(Label("doc", pin=True), 1, 2, 3)
    assert stage.shown() == {"doc": (0, 3, True)}
    stage.store(1, 2, 3)
    assert stage.shown() == {"doc": (3, 3, True)}
    stage.store(*range(100, 140))
    assert stage.there(1, 2, 3) == [1, 2, 3], "forty other blocks went through an arena of twelve"
    assert stage.index.usage.pinned == 3 * ALIGNMENT
    assert stage.labels.pin("doc", None, pinned=False) == (1, "")
    stage.store(*range(200, 240))
    assert stage.there(1, 2, 3) == []
    assert stage.index.usage.pinned == 0


def test_said_twice_is_the_same_as_once() -> None:
    stage = Stage()
    for _ in range(2):
        stage.name(Label("doc", pin=True), 1, 2)
    stage.store(1, 2)
    assert stage.shown() == {"doc": (2, 2, True)}
    stage.labels.pin("doc", None, pinned=False)
    stage.store(*range(100, 140))
    assert stage.there(1, 2) == []


def test_at_its_deadline_a_labels_blocks_leave_but_not_those_that_another_label_names() -> None:
    stage = Stage()
    stage.store(1, 2, 3, 4)
    stage.name(Label("short", ttl_s=10.0, pin=True), 1, 2, 3)
    stage.name(Label("long", ttl_s=60.0), 1, 2, 4)
    stage.clock.advance(9.0)
    assert stage.labels.expire() == []
    assert [round(label.expires_in_s or 0) for label in stage.labels.figures()] == [1, 51]
    stage.clock.advance(2.0)
    assert stage.labels.expire() == [key(3)]
    assert stage.there(1, 2, 3, 4) == [1, 2, 4]
    assert stage.shown() == {"long": (3, 3, False)}


def test_a_label_said_again_lives_from_then_on() -> None:
    stage = Stage()
    stage.store(1)
    stage.name(Label("doc", ttl_s=10.0), 1)
    stage.clock.advance(8.0)
    stage.name(Label("doc", ttl_s=10.0), 1)
    stage.clock.advance(8.0)
    stage.labels.expire()
    assert stage.there(1) == [1]
    stage.clock.advance(3.0)
    stage.labels.expire()
    assert stage.there(1) == []
    assert len(stage.labels) == 0


def test_another_prompt_under_the_same_name_replaces_it_and_its_pin_stays() -> None:
    stage = Stage()
    stage.store(1, 2, 3)
    stage.name(Label("doc", pin=True), 1, 2)
    stage.name(Label("doc"), 1, 3)
    stage.store(*range(100, 140))
    assert stage.there(1, 2, 3) == [1, 3]


def test_labels_pin_half_of_the_arena_and_the_next_is_kept_unpinned() -> None:
    stage = Stage()
    stage.name(Label("big", pin=True), *range(6))
    stage.name(Label("same blocks", pin=True), *range(6))
    stage.name(Label("more", pin=True), 6, 7)
    assert {name: pinned for name, (_, _, pinned) in stage.shown().items()} == {
        "big": True,
        "same blocks": True,
        "more": False,
    }
    assert stage.labels.unpinned == 1
    num_labels, why = stage.labels.pin("more", None, pinned=True)
    assert num_labels == 1
    assert str(CAPACITY // 2) in why
    stage.store(*range(12))
    assert len(stage.index.reserve(2, [key(100 + n) for n in range(6)], ALIGNMENT)) == 6, "the other half is free to go"


def test_tenants_of_one_name_have_labels_of_their_own() -> None:
    stage = Stage()
    stage.store(1, 2)
    stage.name(Label("doc"), 1, tenant=ALICE)
    stage.name(Label("doc"), 2, tenant=BOB)
    assert stage.labels.drop("doc", BOB) == (1, [key(2)])
    assert [label.tenant for label in stage.labels.figures()] == [ALICE]
    assert stage.labels.drop("doc", None) == (1, [key(1)])


def test_a_label_without_a_deadline_ends_with_its_last_block() -> None:
    stage = Stage()
    stage.name(Label("doc"), 1)
    stage.name(Label("never came"), 2)
    stage.store(1)
    stage.clock.advance(UNSEEN_S + 1)
    stage.labels.expire()
    assert list(stage.shown()) == ["doc"]
    stage.store(*range(100, 140))
    stage.clock.advance(UNSEEN_S)
    stage.labels.expire()
    assert stage.shown() == {}


def test_labels_and_their_keys_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LABELS", 3)
    monkeypatch.setattr(module, "MAX_KEYS", 4)
    monkeypatch.setattr(module, "MAX_ALL_KEYS", 9)
    stage = Stage()
    stage.name(Label("a"), *range(10))
    stage.name(Label("b"), *range(4))
    stage.name(Label("c"), 1, 2)
    assert (stage.labels.refused, list(stage.shown())) == (1, ["a", "b"]), "ten keys are more than nine"
    stage.name(Label("c"), 1)
    stage.name(Label("d"))
    assert (stage.labels.refused, list(stage.shown())) == (2, ["a", "b", "c"])
    assert stage.shown()["a"] == (0, 4, False)


def test_labels_survive_their_server_and_a_note_that_was_being_written() -> None:
    memory = Mapping(fd := make_memfd(2 * HALF), 2 * HALF)
    os.close(fd)
    stage = Stage(LabelNotes(memory, 0, HALF))
    stage.store(1, 2)
    stage.name(Label("pinned", pin=True), 1, tenant=ALICE)
    stage.name(Label("short", ttl_s=60.0), 2)
    stage.labels.note()
    stage.clock.advance(20.0)
    stage.labels.drop("pinned", None)
    stage.labels.note()

    again = Stage(LabelNotes(memory, 0, HALF), stage.clock)
    (label,) = again.labels.figures()
    assert (label.name, label.num_tokens, label.expires_in_s) == ("short", 16, 40.0)
    torn = memoryview(memory._mmap)
    torn[memory._mmap.find(key(2))] ^= 1
    torn.release()
    older = Stage(LabelNotes(memory, 0, HALF), stage.clock)
    assert {label.name: label.pinned for label in older.labels.figures()} == {"pinned": True, "short": False}
    older.store(1, 2, *range(100, 140))
    assert older.there(1, 2) == [1]
    memory.close()


def test_more_labels_than_there_is_room_to_note_are_said_to_be_unsaved() -> None:
    memory = Mapping(fd := make_memfd(2 * HALF), 2 * HALF)
    os.close(fd)
    stage = Stage(LabelNotes(memory, 0, HALF))
    stage.name(Label("small"), 1)
    stage.labels.note()
    assert not stage.labels.unsaved
    stage.name(Label("large"), *range(HALF // 16))
    stage.labels.note()
    assert stage.labels.unsaved
    assert len(Stage(LabelNotes(memory, 0, HALF)).labels) == 0, "no label comes back that has changed since"
    memory.close()


class LabelMachine(RuleBasedStateMachine):
    """Names, pins and drops in any order: what is counted is what follows from the labels that live."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = Stage()

    def teardown(self) -> None:
        self.stage.memory.close()

    @rule(
        name=st.sampled_from("abc"),
        numbers=st.lists(st.integers(0, 9), max_size=8),
        ttl_s=st.sampled_from([0.0, 5.0, 50.0]),
        pin=st.booleans(),
        tenant=st.sampled_from([b"", ALICE]),
    )
    def name(self, name: str, numbers: list[int], ttl_s: float, pin: bool, tenant: bytes) -> None:
        self.stage.name(Label(name, ttl_s, pin), *numbers, tenant=tenant)

    @rule(name=st.sampled_from("abc"), pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        self.stage.labels.pin(name, None, pinned=pinned)

    @rule(name=st.sampled_from("abc"))
    def drop(self, name: str) -> None:
        self.stage.labels.drop(name, None)

    @rule(numbers=st.lists(st.integers(0, 20), max_size=8))
    def store(self, numbers: list[int]) -> None:
        before = self.stage.there(*(n for n in range(21) if key(n) in self.stage.index.complete.leaving._kept))
        self.stage.store(*numbers)
        assert self.stage.there(*before) == before, "a pinned block was evicted"

    @rule()
    def pass_time(self) -> None:
        self.stage.clock.advance(10.0)
        self.stage.index.expire()
        self.stage.labels.expire()

    @invariant()
    def pins_follow_from_the_labels(self) -> None:
        held = self.stage.labels._all.values()
        pinned = {key for label in held if label.is_pinned for key in label.named.keys}
        assert self.stage.index.complete.leaving._kept == pinned
        assert self.stage.labels._pinned_bytes == len(pinned) * ALIGNMENT <= CAPACITY * PINNED_SHARE
        ready = [key for key in pinned if self.stage.index.complete.get(key) is not None]
        assert self.stage.index.usage.pinned == len(ready) * ALIGNMENT
        assert self.stage.labels._num_keys == sum(len(label.named.keys) for label in held)
        assert set(self.stage.labels._names) == {key for label in held for key in label.named.keys}


LabelMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestLabels = LabelMachine.TestCase


@pytest.fixture
def tier() -> MemoryTier:
    return MemoryTier()


@pytest.fixture
def server(tmp_path: Path, tier: MemoryTier) -> Iterator[LocalServer]:
    with serving_here(tmp_path, 8 * BLOCK_BYTES, tier) as running:
        yield running


@contextmanager
def connected(server: LocalServer) -> Iterator[CacheClient]:
    made = CacheClient(server.socket, wire.Hello("engine", "boot", BLOCK_BYTES))
    until(lambda: made.is_connected, what="the connection")
    yield made
    made.close()


@pytest.fixture
def client(server: LocalServer) -> Iterator[CacheClient]:
    with connected(server) as made:
        yield made


def store(client: CacheClient, *numbers: int) -> None:
    granted = answer(client, client.reserve(chain(*numbers)))
    client.send(wire.Commit([wire.Written(key(numbers[g.index]), g.offset, 7) for g in granted.grants]))


def test_over_the_socket_labels_are_listed_pinned_and_dropped_everywhere(
    server: LocalServer, client: CacheClient, tier: MemoryTier
) -> None:
    client.send(wire.Name("doc", join_keys([key(1), key(2)]), num_tokens=32, tenant=ALICE))
    store(client, 1, 2)
    until(lambda: labels(server.socket) and labels(server.socket)[0].blocks == 2, what="both blocks")
    (label,) = labels(server.socket)
    assert label == wire.LabelFigures("doc", 2, 2, 32, 2 * BLOCK_BYTES, False, None, ALICE)
    assert pin_label(server.socket, "doc", True)
    assert labels(server.socket)[0].pinned
    assert ask_figures(server.socket)["labels"] == 1
    assert ask_figures(server.socket)["pinned_bytes"] == 2 * BLOCK_BYTES
    until(lambda: len(tier.kept) == 2, what="the blocks below")
    assert not drop_label(server.socket, "doc", BOB)
    assert drop_label(server.socket, "doc")
    assert labels(server.socket) == []
    assert ask_figures(server.socket)["blocks"] == 0
    until(lambda: not tier.kept, what="the tier to forget them")
    assert not drop_label(server.socket, "doc")
    assert not pin_label(server.socket, "doc", True)


def test_when_time_is_over_the_server_drops_the_blocks_by_itself(tmp_path: Path, tier: MemoryTier) -> None:
    clock = ManualClock()
    with serving_here(tmp_path, 8 * BLOCK_BYTES, tier, clock=clock) as server, connected(server) as client:
        store(client, 1)
        until(lambda: len(tier.kept) == 1, what="the block below")
        client.send(wire.Name("doc", join_keys([key(1)]), ttl_s=60.0, pin=True))
        until(lambda: labels(server.socket), what="the label")
        clock.advance(61.0)
        until(lambda: not labels(server.socket), what="its end")
        assert ask_figures(server.socket)["blocks"] == 0
        until(lambda: not tier.kept, what="the tier to forget it")


def test_pinning_too_much_says_so_and_drop_forgets_labels_too(server: LocalServer, client: CacheClient) -> None:
    client.send(wire.Name("big", chain(*range(5)), pin=True))
    until(lambda: labels(server.socket), what="the label")
    assert not labels(server.socket)[0].pinned
    assert ask_figures(server.socket)["labels_unpinned"] == 1
    with pytest.raises(Overloaded, match="half of the arena"):
        pin_label(server.socket, "big", True)
    drop_all(server.socket)
    assert labels(server.socket) == []


@pytest.mark.parametrize(
    "word",
    [
        wire.Name("", b""),
        wire.Name("x" * 129, b""),
        wire.Name("x", b"", ttl_s=-1.0),
        wire.Name("x", b"", ttl_s=math.nan),
        wire.Name("x", b"odd"),
        wire.Name("x", b"", tenant=b"short"),
    ],
)
def test_a_name_that_cannot_be_meant_ends_the_connection(
    server: LocalServer, client: CacheClient, word: wire.Name
) -> None:
    client.send(word)
    until(lambda: client.epoch > 1, what="the end of the connection")
    assert labels(server.socket) == []


PEER = Peer("d", "tcp://d", "b1")


def test_a_ticket_carries_a_label_and_old_tickets_stay_valid() -> None:
    ticket = Handoff("req-1", PEER, label=Label("contract 7", 3600.0, pin=True))
    assert handoff_from_params(ticket.to_params()) == ticket
    old = {"id": "req-1", "decode": {"name": "d", "control": "tcp://d", "boot_id": "b1"}}
    assert handoff_from_params({PARAMS_KEY: old}) == Handoff("req-1", PEER)


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ({"name": ""}, "1 to 128 printable characters"),
        ({"name": "x" * 129}, "1 to 128 printable characters"),
        ({"name": "a\nb"}, "1 to 128 printable characters"),
        ({"name": "x", "ttl_s": -1}, "cannot be kept for -1"),
        ({"name": "x", "ttl_s": math.inf}, "cannot be kept for inf"),
        ({"name": "x", "pinned": True}, "unknown field"),
    ],
)
def test_a_label_that_is_none_is_refused_with_the_reason(label: dict[str, object], said: str) -> None:
    ticket = Handoff("req-1", PEER).to_params()
    ticket[PARAMS_KEY]["label"] = label
    with pytest.raises(ProtocolError, match=said):
        handoff_from_params(ticket)
