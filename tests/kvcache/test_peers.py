"""Two and three real cache servers that are peers: what one computed another finds, or misses and goes on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster.ports import free_ports
from kvcache.client import drop_all
from tests.kvcache.instance import BLOCK_SIZE, Instance
from tests.kvcache.places import BLOCK_BYTES, Server, key
from tests.poll import until

ARENA_BYTES = 32 * BLOCK_BYTES
PROMPT = (1, 2, 3)

Start = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start("a", *words)`: a server of that name, with further words of `--cache`."""
    with ExitStack() as stack:

        def make(name: str, *words: str) -> Server:
            folder = tmp_path / name
            folder.mkdir()
            server = Server(folder, ARENA_BYTES, words)
            stack.callback(server.close)
            server.start()
            return server

        yield make


def port_of(server: Server) -> int:
    return int(server.figures()["served_port"])


def peer_word(server: Server) -> str:
    return f"peer=127.0.0.1:{port_of(server)}"


def compute(server: Server, numbers: tuple[int, ...] = PROMPT) -> list[bytes]:
    """One instance computes these blocks and ends; returns their bytes once the arena has them."""
    before = server.figures()["committed_blocks"]
    instance = Instance(server.socket)
    assert instance.arrive("compute", numbers) == 0
    blocks = [instance.engine.fill(index, number) for index, number in enumerate(numbers)]
    assert instance.compute("compute", numbers, len(numbers)) == len(numbers)
    instance.finish("compute")
    until(lambda: server.figures()["committed_blocks"] == before + len(numbers), what="the last commit")
    instance.close()
    return blocks


def knows(server: Server, num_blocks: int) -> None:
    until(lambda: server.figures()["peer_blocks"] == num_blocks, what=f"{num_blocks} blocks in the directory")


def check_hits(server: Server, blocks: list[bytes], tier: str = "peer", numbers: tuple[int, ...] = PROMPT) -> None:
    """A request for these blocks gets exactly their bytes, from that tier."""
    instance = Instance(server.socket)
    instance.reader._budget_s = 5.0  # also on a machine that is busy with other tests
    assert instance.arrive("hit", (*numbers, 99)) == len(blocks) * BLOCK_SIZE
    loaded = instance.load("hit", len(blocks) * BLOCK_SIZE, list(range(8, 8 + len(blocks))))
    assert (loaded.why, loaded.tiers) == ("", {tier: len(blocks)})
    assert [instance.engine.block(8 + index) for index in range(len(blocks))] == blocks
    instance.finish("hit")
    until(lambda: server.figures()["reserved_bytes"] == 0, what="the place of block 99")
    instance.close()


def test_what_one_host_computed_before_and_after_they_met_the_other_finds(start: Start) -> None:
    a = start("a", "listen=127.0.0.1:0")
    before = compute(a)
    b = start("b", peer_word(a))
    knows(b, 3)
    check_hits(b, before)
    check_hits(b, before, "host")
    after = compute(a, (11, 12))
    knows(b, 5)
    check_hits(b, after, numbers=(11, 12))
    until(lambda: a.figures()["served_blocks"] == 5, what="five blocks to be acknowledged")
    assert b.figures()["peer_connected"] == 1
    assert b.figures()["peer_dropped"] == 0, "nothing is put into peers, and that is no loss"


def check_misses(server: Server, numbers: tuple[int, ...] = PROMPT) -> float:
    """A request for these blocks finds nothing, and goes on; the seconds that its look-up took."""
    instance = Instance(server.socket)
    begun_s = time.monotonic()
    assert instance.arrive("miss", numbers) == 0
    waited_s = time.monotonic() - begun_s
    instance.finish("miss")
    instance.close()
    return waited_s


def test_two_hosts_ask_each_other_and_a_third_asks_both(start: Start) -> None:
    ports = free_ports(2, "127.0.0.1")
    a = start("a", f"listen=127.0.0.1:{ports[0]}", f"peer=127.0.0.1:{ports[1]}")
    b = start("b", f"listen=127.0.0.1:{ports[1]}", f"peer=127.0.0.1:{ports[0]}")
    c = start("c", f"peer=127.0.0.1:{ports[0]}", f"peer=127.0.0.1:{ports[1]}")
    first, second = compute(a, (1, 2)), compute(b, (5, 6))
    for server, num_blocks in ((a, 2), (b, 2), (c, 4)):
        knows(server, num_blocks)
    check_hits(a, second, numbers=(5, 6))
    check_hits(b, first, numbers=(1, 2))
    check_hits(c, first, numbers=(1, 2))
    check_hits(c, second, numbers=(5, 6))


def test_a_killed_peer_costs_misses_and_is_found_again_when_it_is_back(start: Start) -> None:
    """Under the same address, with the arena that it takes over."""
    (port,) = free_ports(1, "127.0.0.1")
    a = start("a", f"listen=127.0.0.1:{port}")
    blocks = compute(a)
    b = start("b", f"peer=127.0.0.1:{port}")
    knows(b, 3)
    a.kill()
    until(lambda: b.figures()["peer_connected"] == 0, what="the end of the connection")
    assert b.figures()["peer_blocks"] == 0
    assert check_misses(b) < 1.0
    assert "3 blocks taken over" in a.start()
    knows(b, 3)
    check_hits(b, blocks)


def test_a_peer_that_is_killed_while_a_prompt_is_read_costs_the_rest_of_it(start: Start) -> None:
    a = start("a", "listen=127.0.0.1:0")
    blocks = compute(a)
    b = start("b", peer_word(a))
    knows(b, 3)
    assert a.process is not None
    os.kill(a.process.pid, signal.SIGSTOP)  # what is asked for now is under way when it is killed
    instance = Instance(b.socket)
    instance.reader.arrive("caught", [key(n) for n in PROMPT], reserve=True)
    until(lambda: b.figures()["reserved_bytes"] > 0, what="places for what is coming")
    a.kill()
    until(lambda: instance.look_up("caught", PROMPT) == 0, what="the miss")
    assert [instance.engine.fill(index, number) for index, number in enumerate(PROMPT)] == blocks
    instance.writer.arrive("caught", [key(n) for n in PROMPT], asked=True)
    instance.compute("caught", PROMPT, 3)
    instance.finish("caught")
    until(lambda: b.figures()["reserved_bytes"] + b.figures()["cooling_bytes"] == 0, what="every place")
    num_found = instance.arrive("next", PROMPT) // BLOCK_SIZE
    assert num_found + instance.compute("next", PROMPT, 3) == 3, "what was not stored then can be now"
    instance.finish("next")
    instance.close()


def test_a_hung_peer_delays_a_look_up_for_a_bounded_time_and_is_bypassed(start: Start) -> None:
    a = start("a", "listen=127.0.0.1:0")
    blocks = compute(a)
    b = start("b", peer_word(a))
    knows(b, 3)
    assert a.process is not None
    os.kill(a.process.pid, signal.SIGSTOP)
    try:
        assert check_misses(b) < 3.0
        until(lambda: b.figures()["peer_connected"] == 0, what="its silence to be noticed")
        assert check_misses(b) < 0.5
        assert b.figures()["peer_errors"] > 0
    finally:
        os.kill(a.process.pid, signal.SIGCONT)
    until(lambda: b.figures()["peer_blocks"] == 3, what="the peer's return")
    until(lambda: b.figures()["peer_bypassed"] == 0 or probes(b), what="the breaker to close")
    check_hits(b, blocks)


def probes(server: Server) -> bool:
    """One more request, which the breaker may let through."""
    instance = Instance(server.socket)
    num_found = instance.arrive("probe", PROMPT, computes=False)
    instance.finish("probe")
    instance.close()
    return num_found > 0


def test_what_a_host_drops_its_peers_do_not_ask_for_any_more(start: Start) -> None:
    a = start("a", "listen=127.0.0.1:0")
    compute(a)
    b = start("b", peer_word(a))
    knows(b, 3)
    drop_all(a.socket)
    knows(b, 0)
    check_misses(b)
    assert a.figures()["served_missing"] == 0


def test_dropping_ones_own_blocks_leaves_those_of_peers(start: Start) -> None:
    a = start("a", "listen=127.0.0.1:0")
    blocks = compute(a)
    b = start("b", peer_word(a))
    knows(b, 3)
    check_hits(b, blocks)
    drop_all(b.socket)
    check_hits(b, blocks)


def test_an_address_in_use_is_refused_with_its_name(start: Start, tmp_path: Path) -> None:
    a = start("a", "listen=127.0.0.1:0")
    folder = tmp_path / "second"
    folder.mkdir()
    second = Server(folder, ARENA_BYTES, (f"listen=127.0.0.1:{port_of(a)}",))
    why = second.run_to_the_end()
    assert f"cannot listen at 127.0.0.1:{port_of(a)} for peers" in why
    assert "Traceback" not in why
    second.close()
