"""Two and three real cache servers that are peers: what one computed another finds, or misses and goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.kvcache.instance import BLOCK_SIZE, Instance
from tests.kvcache.places import BLOCK_BYTES, Server
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
