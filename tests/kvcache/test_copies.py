"""Blocks through the arena: equal bytes, or no hit; never a wrong byte, whoever dies in between."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.clock import ManualClock
from kvcache.client import ask_figures, fetch_arena
from kvcache.index import RESERVATION_S
from kvcache.partial import PartialBlocks
from kvcache.prompt import KeyedPrompt
from tests.kvcache.instance import BLOCK_SIZE, ROOT, Instance
from tests.kvcache.places import BLOCK_BYTES, Server, key, serving
from tests.poll import until
from transport.mapping import Mapping

ARENA_BYTES = 32 * BLOCK_BYTES
PROMPT = (1, 2, 3)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path, ARENA_BYTES) as running:
        yield running


@pytest.fixture
def pair(server: Server) -> Iterator[tuple[Instance, Instance]]:
    instances = Instance(server.socket, "a"), Instance(server.socket, "b")
    yield instances
    for instance in instances:
        instance.close()


def store_prompt(instance: Instance, request: str = "first") -> list[bytes]:
    """Computes and stores PROMPT in two steps; returns its blocks."""
    assert instance.arrive(request, PROMPT) == 0
    blocks = [instance.engine.fill(index, number) for index, number in enumerate(PROMPT)]
    assert instance.compute(request, PROMPT, 2) == 2
    assert instance.compute(request, PROMPT, 3) == 1
    instance.finish(request)
    until(lambda: ask_figures(instance.socket)["committed_blocks"] == 3, what="the commits")
    return blocks


def test_what_one_instance_computed_another_loads_byte_by_byte(pair: tuple[Instance, Instance]) -> None:
    a, b = pair
    blocks = store_prompt(a)
    num_tokens = b.arrive("second", PROMPT)
    assert num_tokens == 3 * BLOCK_SIZE
    loaded = b.load("second", num_tokens, [9, 4, 7])
    assert (loaded.why, loaded.num_blocks, loaded.num_bytes) == ("", 3, 3 * BLOCK_BYTES)
    assert [b.engine.block(block_id) for block_id in (9, 4, 7)] == blocks


def test_nothing_is_stored_twice_and_nothing_stays_reserved_or_pinned(
    server: Server, pair: tuple[Instance, Instance]
) -> None:
    a, b = pair
    store_prompt(a)
    for instance, request in ((a, "again"), (b, "other")):
        assert instance.arrive(request, (*PROMPT, 4)) == 3 * BLOCK_SIZE
        instance.finish(request)
    until(lambda: server.figures()["reserved_bytes"] == 0, what="the places of block 4")
    assert server.figures()["committed_blocks"] == 3
    for number in range(50, 90):  # everything can be evicted: nothing is pinned any more
        assert a.arrive(f"r{number}", (number,)) == 0
        assert a.compute(f"r{number}", (number,), 1) == 1
        a.finish(f"r{number}")
    assert a.arrive("gone", PROMPT) == 0


@pytest.mark.parametrize("everybody", [False, True])
def test_what_a_spoilt_step_computed_is_never_found_and_its_places_come_back(
    server: Server, pair: tuple[Instance, Instance], everybody: bool
) -> None:
    """Of the one who has computed with blocks that are not what they should be; or of all, where nobody knows whose."""
    a, b = pair
    assert a.arrive("spoilt", PROMPT) == 0
    assert a.arrive("other", (7,)) == 0

    def spoils() -> None:
        a.storer.spoil(None if everybody else {"spoilt"})

    a.writer.granted("other", a.reader.grants("other"))
    a.writer.scheduled("other", [key(7)], BLOCK_SIZE, list(range(16)))
    assert a.compute("spoilt", PROMPT, 3, spoils=spoils) == (0 if everybody else 1)
    for request in ("spoilt", "other"):
        a.finish(request)
    until(lambda: server.figures()["reserved_bytes"] == 0, what="the places")
    assert b.arrive("second", PROMPT) == 0
    assert b.arrive("third", (7,)) == (0 if everybody else BLOCK_SIZE)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_one_flipped_bit_is_a_miss_and_is_never_found_again(
    server: Server, pair: tuple[Instance, Instance], layer: int
) -> None:
    a, b = pair
    store_prompt(a)
    fd, num_bytes, _ = fetch_arena(server.socket, "test")
    arena = Mapping(fd, num_bytes)
    os.close(fd)
    place = bytes(arena._mmap).find(f"2/{layer};2/{layer};".encode())
    arena._mmap[place + 1000] ^= 0x10
    assert b.arrive("second", PROMPT) == 3 * BLOCK_SIZE
    loaded = b.load("second", 3 * BLOCK_SIZE, [0, 1, 2])
    assert "differs" in loaded.why
    until(lambda: server.figures()["quarantined_blocks"] == 1, what="the quarantine")
    assert b.arrive("third", PROMPT) == BLOCK_SIZE, "the prefix before the bad block"
    arena.close()


def test_a_block_under_another_key_is_no_hit(server: Server, pair: tuple[Instance, Instance]) -> None:
    """The digest binds the bytes to their key: a server that mixes places up cannot make a request read them."""
    a, b = pair
    store_prompt(a)
    assert b.arrive("second", PROMPT) == 3 * BLOCK_SIZE
    look_up = b.reader._all["second"]
    look_up.slots[0], look_up.slots[1] = look_up.slots[1], look_up.slots[0]
    assert "differs" in b.load("second", 3 * BLOCK_SIZE, [0, 1, 2]).why


def test_the_servers_death_costs_hits_and_no_request(server: Server, pair: tuple[Instance, Instance]) -> None:
    a, b = pair
    blocks = store_prompt(a)
    assert b.arrive("second", PROMPT) == 3 * BLOCK_SIZE
    assert a.arrive("open", (7, 8)) == 0
    server.kill()
    assert b.load("second", 3 * BLOCK_SIZE, [0, 1, 2]).why == "", "the arena is mapped: its copy needs no server"
    assert b.engine.block(0) == blocks[0]
    assert a.compute("open", (7, 8), 2) in (0, 2)
    a.finish("open")
    assert a.arrive("during", PROMPT) == 0
    assert a.compute("during", PROMPT, 3) == 0
    a.finish("during")
    server.start()
    until(lambda: a.client.is_connected and b.client.is_connected, what="the connections")
    assert b.arrive("after", PROMPT) == 3 * BLOCK_SIZE
    assert a.arrive("uncommitted", (7, 8)) == 0


def test_a_server_killed_between_reserve_and_commit_leaves_nothing_held_and_nothing_wrong(
    server: Server, pair: tuple[Instance, Instance]
) -> None:
    """Its successor gives the same places to another writer, while the first has not noticed yet."""
    a, b = pair
    assert a.arrive("first", PROMPT) == 0
    blocks = [a.engine.fill(index, number) for index, number in enumerate(PROMPT)]
    a.writer.granted("first", a.reader.grants("first"))
    server.kill()
    server.start()
    until(lambda: b.client.epoch == 2 and a.client.epoch == 2, what="both connections")
    assert b.arrive("other", (7, 8, 9)) == 0
    others = [b.engine.fill(index, number) for index, number in enumerate((7, 8, 9))]
    assert b.compute("other", (7, 8, 9), 3) == 3
    a.writer.scheduled("first", [key(n) for n in PROMPT], 3 * BLOCK_SIZE, list(range(3)))
    assert a.step() == 0, "its places were the dead server's"
    for instance, request in ((a, "first"), (b, "other")):
        instance.finish(request)
    until(lambda: server.figures()["reserved_bytes"] == 0, what="every place")
    assert a.arrive("after", (7, 8, 9)) == 3 * BLOCK_SIZE
    assert a.load("after", 3 * BLOCK_SIZE, [8, 9, 10]).why == ""
    assert [a.engine.block(block_id) for block_id in (8, 9, 10)] == others
    assert a.arrive("again", PROMPT) == 0
    assert a.compute("again", PROMPT, 3) == 3
    assert b.arrive("again", PROMPT) == 3 * BLOCK_SIZE
    assert b.load("again", 3 * BLOCK_SIZE, [8, 9, 10]).why == ""
    assert [b.engine.block(block_id) for block_id in (8, 9, 10)] == blocks


def test_a_hanging_server_costs_each_request_its_budget_until_the_breaker_opens_and_it_closes_again(
    server: Server, pair: tuple[Instance, Instance]
) -> None:
    a, _ = pair
    store_prompt(a)
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGSTOP)
    waits = []
    try:
        for number in range(8):
            begun_s = time.monotonic()
            assert a.arrive(f"r{number}", PROMPT) == 0
            waits.append(time.monotonic() - begun_s)
            a.finish(f"r{number}")
        assert max(waits[3:]) < 0.09, "after three failures nobody waits any more"
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    numbers = iter(range(100, 10_000))

    def hits() -> bool:
        request = f"r{next(numbers)}"
        tokens = a.arrive(request, PROMPT)
        a.finish(request)
        return tokens == 3 * BLOCK_SIZE

    until(hits, 15.0, "a hit after the server has recovered")
    until(lambda: server.figures()["reserved_bytes"] == 0, what="places of requests that did not wait")


def test_what_is_granted_when_nobody_is_there_any_more_is_given_back_without_another_step(
    server: Server, pair: tuple[Instance, Instance]
) -> None:
    """The last request of an idle engine leaves while the server is slow: with its look-up open, with a look-up that it
    did not wait for, and with a question for the places of its answer."""
    a, b = pair
    store_prompt(a)
    assert b.arrive("writes", (1,)) == BLOCK_SIZE
    before = server.figures()["questions"]
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        open_one = b.prompt("open", (1, 2, 41))
        b.reader.arrive(open_one, reserve=True)
        assert b.arrive("late", (1, 2, 42)) == 0
        b.compute("writes", (1, 43), 2)
        for request in ("open", "late", "writes"):
            b.finish(request)
    finally:
        os.kill(server.process.pid, signal.SIGCONT)

    def is_settled() -> bool:
        figures = server.figures()
        return figures["reserved_bytes"] + figures["cooling_bytes"] == 0

    until(lambda: server.figures()["questions"] == before + 3, what="the server to have heard all of it")
    until(is_settled, 5.0, "the places that nobody writes")
    for number in range(50, 90):  # nothing is pinned: all of the arena may be others'
        a.arrive(f"r{number}", (number,))
        assert a.compute(f"r{number}", (number,), 1) == 1, number
        a.finish(f"r{number}")


def test_a_request_with_a_near_deadline_waits_a_tenth_of_it(server: Server) -> None:
    clock = ManualClock()
    instance = Instance(server.socket, clock=clock)
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        keys = [key(number) for number in PROMPT]
        partials = PartialBlocks(ROOT, keys, (), BLOCK_SIZE)
        for request, within_s in (("near", 0.4), ("far", math.inf)):
            prompt = KeyedPrompt(request, len(PROMPT) * BLOCK_SIZE + 1, keys, partials, within_s=within_s)
            instance.reader.arrive(prompt, reserve=True)
        clock.advance(0.03)
        assert [instance.look_up(request, PROMPT) for request in ("near", "far")] == [None, None]
        clock.advance(0.02)
        assert [instance.look_up(request, PROMPT) for request in ("near", "far")] == [0, None]
        clock.advance(0.06)
        assert instance.look_up("far", PROMPT) == 0
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
        instance.close()


def test_a_late_grant_is_used_in_a_later_step_and_blocks_of_the_answer_are_stored(
    server: Server, pair: tuple[Instance, Instance]
) -> None:
    """A decode instance stores what it computes, token by token, although it asks for places only then."""
    a, b = pair
    a.arrive("chat", (), computes=False)
    a.writer.arrive(KeyedPrompt("chat", 1, [], PartialBlocks(ROOT, [], (), BLOCK_SIZE)), asked=False)
    for index, number in enumerate((21, 22)):
        a.engine.fill(index, number)

    def stored() -> bool:
        a.compute("chat", (21, 22), 2)
        return server.figures()["committed_blocks"] == 2

    until(stored, what="both blocks of the answer")
    assert b.arrive("next turn", (21, 22)) == 2 * BLOCK_SIZE


def test_a_preempted_or_cancelled_load_keeps_its_pins_until_its_copy_ended(
    server: Server, pair: tuple[Instance, Instance]
) -> None:
    a, b = pair
    store_prompt(a)
    assert b.arrive("second", PROMPT)
    assert b.reader.load("second", [0, 1, 2], 0, 3 * BLOCK_SIZE)
    b.finish("second")
    for number in range(50, 90):
        a.arrive(f"r{number}", (number,))
        a.compute(f"r{number}", (number,), 1)
        a.finish(f"r{number}")
    for load in b.reader.take_loads():
        b.loader.start(load)
    (loaded,) = until(b.loader.ended, what="the load")
    assert loaded.why == "", "its blocks were pinned although the request had gone"
    b.reader.on_loaded(loaded)


def test_a_place_that_a_queued_request_let_expire_does_not_keep_its_later_blocks_from_being_stored(
    server: Server,
) -> None:
    clock = ManualClock()
    instance = Instance(server.socket, clock=clock)
    instance.arrive("queued", (31,))
    instance.writer.granted("queued", instance.reader.grants("queued"))
    clock.advance(RESERVATION_S)
    assert instance.compute("queued", (31,), 1) == 0, "the place may be another's by now"
    until(lambda: instance.compute("queued", (31, 32), 2), what="the second block")
    instance.close()
