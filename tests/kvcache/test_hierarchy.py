"""Tiers below the arena in a real server process: what went down comes up again, or costs nothing but a miss."""

from __future__ import annotations

from pathlib import Path

from tests.kvcache.instance import BLOCK_SIZE, Instance
from tests.kvcache.places import BLOCK_BYTES, Server, serving
from tests.kvcache.test_redis import RedisServer, needs_server
from tests.poll import until

ARENA_BYTES = 32 * BLOCK_BYTES
PROMPT = (1, 2, 3)


def disk_of(folder: Path) -> str:
    return f"disk={folder}/disk:{100 * BLOCK_BYTES}"


def store_prompt(server: Server, figure: str = "disk_blocks") -> list[bytes]:
    """One instance computes PROMPT and ends; returns its blocks once a tier below has them."""
    instance = Instance(server.socket)
    assert instance.arrive("first", PROMPT) == 0
    blocks = [instance.engine.fill(index, number) for index, number in enumerate(PROMPT)]
    assert instance.compute("first", PROMPT, 3) == 3
    instance.finish("first")
    until(lambda: server.figures()[figure] == 3, what="the blocks below the arena")
    instance.close()
    return blocks


def test_after_everything_was_killed_the_disk_still_has_it(tmp_path: Path) -> None:
    with serving(tmp_path, ARENA_BYTES, disk_of(tmp_path)) as server:
        blocks = store_prompt(server)
    with serving(tmp_path, ARENA_BYTES, disk_of(tmp_path)) as server:
        assert server.figures()["blocks"] == 0, "another arena"
        instance = Instance(server.socket)
        assert instance.arrive("second", (*PROMPT, 4)) == 3 * BLOCK_SIZE
        loaded = instance.load("second", 3 * BLOCK_SIZE, [9, 4, 7])
        assert (loaded.why, loaded.tiers) == ("", {"disk": 3})
        assert [instance.engine.block(block_id) for block_id in (9, 4, 7)] == blocks
        assert instance.arrive("third", PROMPT) == 3 * BLOCK_SIZE
        assert instance.load("third", 3 * BLOCK_SIZE, [1, 2, 3]).tiers == {"host": 3}
        instance.finish("second")
        until(lambda: server.figures()["reserved_bytes"] == 0, what="the place of block 4")
        instance.close()


def test_a_flipped_bit_on_the_disk_is_a_miss_and_ends_the_prefix_there(tmp_path: Path) -> None:
    with serving(tmp_path, ARENA_BYTES, disk_of(tmp_path)) as server:
        store_prompt(server)
    spoiled = [path for path in (tmp_path / "disk").rglob("*") if path.is_file() and b"2/0;2/0;" in path.read_bytes()]
    (path,) = spoiled
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with serving(tmp_path, ARENA_BYTES, disk_of(tmp_path)) as server:
        instance = Instance(server.socket)
        assert instance.arrive("second", PROMPT) == BLOCK_SIZE
        assert instance.load("second", BLOCK_SIZE, [0]).why == ""
        assert server.figures()["disk_corrupt"] == 1
        instance.close()


def test_a_redis_that_is_not_there_costs_a_moment_and_no_block(tmp_path: Path) -> None:
    with serving(tmp_path, ARENA_BYTES, "redis://127.0.0.1:9/0") as server:
        instance = Instance(server.socket)
        for number in range(5):
            request = f"r{number}"
            assert instance.arrive(request, (10 + number,)) == 0
            instance.engine.fill(0, 10 + number)
            instance.compute(request, (10 + number,), 1)
            instance.finish(request)
        until(lambda: server.figures()["redis_bypassed"] == 1, what="the breaker")
        assert server.figures()["redis_errors"] > 0
        instance.close()


@needs_server
def test_another_host_finds_it_in_redis_and_one_of_two_servers_may_die(tmp_path: Path) -> None:
    servers = [RedisServer(tmp_path), RedisServer(tmp_path)]
    try:
        for redis in servers:
            redis.start()
        tiers = [redis.url for redis in servers]
        with serving(tmp_path, ARENA_BYTES, *tiers) as server:
            blocks = store_prompt(server, "redis_puts")
        servers[0].kill()
        with serving(tmp_path, ARENA_BYTES, *tiers) as server:
            instance = Instance(server.socket)
            assert instance.arrive("second", PROMPT) == 3 * BLOCK_SIZE
            loaded = instance.load("second", 3 * BLOCK_SIZE, [9, 4, 7])
            assert (loaded.why, loaded.tiers) == ("", {"redis": 3})
            assert [instance.engine.block(block_id) for block_id in (9, 4, 7)] == blocks
            instance.close()
    finally:
        for redis in servers:
            redis.close()


def test_with_write_back_a_server_that_is_stopped_leaves_what_it_had_on_the_disk(tmp_path: Path) -> None:
    """SIGTERM, as a launcher sends it; the next server has another arena."""
    with serving(tmp_path, ARENA_BYTES, disk_of(tmp_path), "write=back") as server:
        blocks = store_prompt(server, "blocks")
        assert server.figures()["disk_blocks"] == 0
        assert server.process is not None
        server.process.terminate()
        assert server.process.wait(10) == 0
    with serving(tmp_path, ARENA_BYTES, disk_of(tmp_path), "write=back") as server:
        instance = Instance(server.socket)
        assert instance.arrive("second", PROMPT) == 3 * BLOCK_SIZE
        assert instance.load("second", 3 * BLOCK_SIZE, [9, 4, 7]).tiers == {"disk": 3}
        assert [instance.engine.block(block_id) for block_id in (9, 4, 7)] == blocks
        instance.close()


def test_with_admit_second_only_what_was_found_again_reaches_the_disk(tmp_path: Path) -> None:
    with serving(tmp_path, ARENA_BYTES, disk_of(tmp_path), "admit=second") as server:
        store_prompt(server, "blocks")
        instance = Instance(server.socket)
        assert instance.arrive("second", PROMPT[:2]) == 2 * BLOCK_SIZE
        until(lambda: server.figures()["disk_blocks"] == 2, what="the blocks that were found")
        instance.finish("second")
        instance.close()
