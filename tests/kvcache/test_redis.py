"""Blocks in real Redis servers: what is given back when servers die, hang, come back, or hold something else."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from core.clock import Clock, ManualClock
from core.errors import ConfigError
from kvcache.breaker import LONGEST_PAUSE_S
from kvcache.conformance import BLOCK_BYTES, block_of, check_tier, key_of, read
from kvcache.faulty_tier import FaultyTier, TierFaults
from kvcache.redis_server import KEY_PREFIX
from kvcache.redis_tier import RedisTier
from kvcache.tier import TierError
from tests.poll import until

redis = pytest.importorskip("redis")

BINARY = shutil.which("redis-server")
HEADER_BYTES = 32
TIMEOUT_S = 0.5
SLACK_S = 2.0
needs_server = pytest.mark.skipif(BINARY is None, reason="no redis-server: apt-get install redis-server")


class RedisServer:
    """A redis-server process that keeps nothing on disk."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as unused:
            self.port = unused.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.name = f"127.0.0.1:{self.port}/0"
        self._folder = folder
        self.raw: Any = redis.Redis(port=self.port, socket_timeout=5)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(self._folder)]
        command = [str(BINARY), "--port", str(self.port), *options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(self._answers, what="redis-server")

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()

    def pause(self) -> None:
        """Keeps its port and connections, and answers nothing more."""
        assert self._process
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.raw.close()
        self.kill()

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "redis-server has ended"
        try:
            return bool(self.raw.ping())
        except redis.RedisError:
            return False


class Listener:
    """Accepts every connection, reads something, and answers always the same."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        self.connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for connection in (self._listener, *self.connections):
            connection.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections.append(connection)
            connection.settimeout(5)
            connection.recv(65536)
            connection.sendall(self._answer)


StartServers = Callable[[int], list[RedisServer]]
MakeTier = Callable[..., RedisTier]


@pytest.fixture
def start_servers(tmp_path: Path) -> Iterator[StartServers]:
    started: list[RedisServer] = []

    def start(number: int) -> list[RedisServer]:
        for _ in range(number):
            started.append(RedisServer(tmp_path))
            started[-1].start()
        return started[-number:]

    yield start
    for server in started:
        server.close()


@pytest.fixture
def make_tier() -> Iterator[MakeTier]:
    made: list[RedisTier] = []

    def make(servers: list[RedisServer], clock: Clock | None = None, **options: Any) -> RedisTier:
        tier = RedisTier([server.url for server in servers], timeout_s=TIMEOUT_S, clock=clock, **options)
        made.append(tier)
        return tier

    yield make
    for tier in made:
        tier.close()


def put(tier: RedisTier, *numbers: int) -> dict[int, bytes]:
    """Puts blocks with their numbers as digests; their bytes by number."""
    blocks = {number: block_of(number) for number in numbers}
    for number, block in blocks.items():
        tier.put(key_of(number), number, memoryview(block))
    return blocks


def assert_there(tier: RedisTier, blocks: dict[int, bytes]) -> None:
    for number, block in blocks.items():
        assert read(tier, number) == (number, block)


def raw_key(number: int) -> bytes:
    return KEY_PREFIX + key_of(number)


# What every tier does


@needs_server
@pytest.mark.parametrize("number", [1, 2, 3])
def test_it_is_a_tier(number: int, start_servers: StartServers, make_tier: MakeTier) -> None:
    servers = start_servers(number)
    check_tier(lambda: make_tier(servers))


@needs_server
def test_it_still_is_when_every_call_is_late(start_servers: StartServers, make_tier: MakeTier) -> None:
    servers = start_servers(2)
    check_tier(lambda: FaultyTier(make_tier(servers), TierFaults(delay_s=0.005)))


@needs_server
def test_its_figures_count_a_block_once_however_many_replicas(start_servers: StartServers, make_tier: MakeTier) -> None:
    tier = make_tier(start_servers(2))
    put(tier, 1, 2)
    put(tier, 2)
    assert (tier.figures().blocks, tier.figures().num_bytes) == (2, 2 * BLOCK_BYTES)


@needs_server
def test_two_processes_share_blocks(start_servers: StartServers, make_tier: MakeTier) -> None:
    servers = start_servers(2)
    blocks = put(make_tier(servers), *range(8))
    assert_there(make_tier(servers[::-1]), blocks)


@needs_server
def test_a_block_expires(start_servers: StartServers, make_tier: MakeTier) -> None:
    [server] = start_servers(1)
    put(make_tier([server], ttl_s=60), 1)
    assert 50_000 < server.raw.pttl(raw_key(1)) <= 60_000
    tier = make_tier([server], ttl_s=0.2)
    put(tier, 2)
    until(lambda: tier.contains([key_of(2)]) == 0, timeout_s=5, what="the block's end")
    assert read(tier, 2)[0] is None
    assert tier.figures().corrupt == 0


@needs_server
def test_a_block_without_time_to_live_stays(start_servers: StartServers, make_tier: MakeTier) -> None:
    [server] = start_servers(1)
    put(make_tier([server]), 1)
    assert server.raw.pttl(raw_key(1)) == -1


@needs_server
def test_after_close_it_raises_tier_errors(start_servers: StartServers, make_tier: MakeTier) -> None:
    [server] = start_servers(1)
    tier = make_tier([server])
    put(tier, 1)
    assert server.raw.info("clients")["connected_clients"] == 2
    tier.close()
    until(lambda: server.raw.info("clients")["connected_clients"] == 1, what="the connection's end")
    with pytest.raises(TierError, match="closed"):
        read(tier, 1)
    assert tier.figures().blocks == 1


# Placement


def test_a_joining_server_takes_its_share_and_moves_nothing_else() -> None:
    urls = [f"redis://10.0.0.{host}" for host in range(1, 6)]
    before, after = RedisTier(urls[:4], replicas=1), RedisTier(urls, replicas=1)
    keys = [key_of(number) for number in range(2000)]
    moved = [key for key in keys if before.placement(key) != after.placement(key)]
    assert {after.placement(key)[0] for key in moved} == {"10.0.0.5:6379/0"}
    assert 300 < len(moved) < 500, "a fifth of the keys"
    shares = [sum(before.placement(key) == [f"10.0.0.{host}:6379/0"] for key in keys) for host in range(1, 5)]
    assert min(shares) > 400, "about a quarter each"


def test_the_order_of_urls_and_their_passwords_place_nothing() -> None:
    urls = [f"redis://10.0.0.{host}:6380/3" for host in range(1, 5)]
    with_password = [url.replace("//", "//user:secret@") for url in reversed(urls)]
    for number in range(20):
        placement = RedisTier(urls).placement(key_of(number))
        assert placement == RedisTier(with_password).placement(key_of(number))
        assert len(set(placement)) == 2


# Servers that die, hang and come back


@needs_server
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_server_loses_nothing_and_puts_go_on(
    victim: int, start_servers: StartServers, make_tier: MakeTier
) -> None:
    servers = start_servers(2)
    tier = make_tier(servers)
    blocks = put(tier, *range(10))
    servers[victim].kill()
    assert_there(tier, blocks)
    assert tier.contains([key_of(number) for number in blocks]) == 10
    more = put(tier, *range(10, 14))
    assert_there(tier, more)
    tier.delete([key_of(0)])
    assert read(tier, 0)[0] is None


@needs_server
def test_with_one_replica_only_the_dead_servers_blocks_are_missed(
    start_servers: StartServers, make_tier: MakeTier
) -> None:
    servers = start_servers(2)
    tier = make_tier(servers, replicas=1)
    blocks = put(tier, *range(20))
    homes = {number: tier.placement(key_of(number)) for number in blocks}
    lost = [number for number, home in homes.items() if home == [servers[0].name]]
    kept = [number for number in blocks if number not in lost]
    assert lost
    assert kept
    servers[0].kill()
    assert_there(tier, {number: blocks[number] for number in kept})
    for call in (lambda: read(tier, lost[0]), lambda: put(tier, lost[0]), lambda: tier.contains([key_of(lost[0])])):
        with pytest.raises(TierError):
            call()
    with pytest.raises(TierError):
        tier.delete([key_of(kept[0]), key_of(lost[0])])
    kept_first = [key_of(kept[1]), key_of(lost[0])]
    assert tier.contains(kept_first) == 1, "what is known to be there counts"


@needs_server
def test_both_dead_is_an_error_and_one_that_is_back_is_used_again(
    start_servers: StartServers, make_tier: MakeTier
) -> None:
    servers = start_servers(2)
    clock = ManualClock()
    tier = make_tier(servers, clock=clock)
    put(tier, 1)
    for server in servers:
        server.kill()
    begin_s = time.monotonic()
    for _ in range(10):
        with pytest.raises(TierError):
            read(tier, 1)
        with pytest.raises(TierError):
            put(tier, 2)
    assert time.monotonic() - begin_s < TIMEOUT_S + SLACK_S
    servers[1].start()
    with pytest.raises(TierError, match="left out"):
        put(tier, 2)
    clock.advance(LONGEST_PAUSE_S + 1)
    assert_there(tier, put(tier, 2))
    assert read(tier, 1)[0] is None, "it has come back empty"


@needs_server
def test_a_block_is_found_on_the_second_server_when_the_first_has_come_back_empty(
    start_servers: StartServers, make_tier: MakeTier
) -> None:
    servers = start_servers(2)
    tier = make_tier(servers)
    blocks = put(tier, *range(6))
    servers[0].kill()
    servers[0].start()
    assert tier.contains([key_of(number) for number in blocks]) == 6
    assert_there(tier, blocks)
    assert tier.figures().corrupt == 0


@needs_server
def test_a_hanging_server_costs_its_timeout_once_and_is_asked_again_later(
    start_servers: StartServers, make_tier: MakeTier
) -> None:
    servers = start_servers(2)
    clock = ManualClock()
    tier = make_tier(servers, clock=clock)
    blocks = put(tier, *range(16))
    servers[0].pause()
    begin_s = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda number: read(tier, number), list(blocks) * 8))
    assert results == list(blocks.items()) * 8
    assert time.monotonic() - begin_s < TIMEOUT_S + SLACK_S, "not once per call"
    servers[0].resume()
    until(servers[0].raw.ping, what="the server")
    clock.advance(1.5)  # eight threads that waited for the same silence have not made the pause longer
    put(tier, *range(16, 20))
    assert all(servers[0].raw.exists(raw_key(number)) for number in range(16, 20))


@needs_server
def test_a_hanging_server_alone_is_an_error_within_the_timeout(
    start_servers: StartServers, make_tier: MakeTier
) -> None:
    [server] = start_servers(1)
    tier = make_tier([server])
    put(tier, 1)
    server.pause()
    for expected_s in (TIMEOUT_S, 0.0):
        begin_s = time.monotonic()
        with pytest.raises(TierError):
            read(tier, 1)
        assert expected_s <= time.monotonic() - begin_s < expected_s + SLACK_S


@needs_server
def test_the_pause_doubles_up_to_its_longest(start_servers: StartServers, make_tier: MakeTier) -> None:
    [server] = start_servers(1)
    server.kill()
    clock = ManualClock()
    tier = make_tier([server], clock=clock)
    for pause_s in (1, 2, 4, 8, 16, 30, 30):
        with pytest.raises(TierError, match="refused"):
            read(tier, 1)
        clock.advance(pause_s - 0.1)
        with pytest.raises(TierError, match="left out"):
            read(tier, 1)
        clock.advance(0.2)


@needs_server
def test_a_full_server_refuses_puts_and_goes_on_giving(start_servers: StartServers, make_tier: MakeTier) -> None:
    [server] = start_servers(1)
    tier = make_tier([server])
    blocks = put(tier, 1)
    server.raw.config_set("maxmemory", "1")
    with pytest.raises(TierError, match="maxmemory"):
        put(tier, 2)
    assert_there(tier, blocks)
    server.raw.config_set("maxmemory", "0")
    assert_there(tier, put(tier, 2))


@needs_server
def test_a_server_that_wants_a_password_it_was_not_given_is_an_error(
    start_servers: StartServers, make_tier: MakeTier
) -> None:
    [server] = start_servers(1)
    server.raw.config_set("requirepass", "secret")
    with pytest.raises(TierError, match="Authentication required"):
        read(make_tier([server]), 1)
    with pytest.raises(TierError):
        put(make_tier([server]), 1)
    tier = RedisTier([server.url.replace("//", "//:secret@")])
    assert_there(tier, put(tier, 1))
    tier.close()


# Values that are not what was put


def _flipped_payload(value: bytes) -> bytes:
    at = HEADER_BYTES + 1000
    return value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :]


def _flipped_digest(value: bytes) -> bytes:
    return value[:8] + bytes([value[8] ^ 1]) + value[9:]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "payload": _flipped_payload,
    "digest": _flipped_digest,
    "version": lambda value: value[:7] + b"\x02" + value[8:],
    "truncated": lambda value: value[:-1],
    "longer": lambda value: value + b"\0",
    "header alone": lambda value: value[:HEADER_BYTES],
    "part of a header": lambda value: value[:5],
    "empty": lambda value: b"",
    "foreign": lambda value: b'{"user": 1}',
    "foreign and large": lambda value: b"x" * 2_000_000,
    "foreign of the same size": lambda value: b"x" * len(value),
}


@needs_server
def test_a_damaged_value_is_a_miss_deleted_and_counted(start_servers: StartServers, make_tier: MakeTier) -> None:
    [server] = start_servers(1)
    tier = make_tier([server])
    put(tier, 1)
    value = server.raw.get(raw_key(1))
    for corrupt, (name, damage) in enumerate(DAMAGES.items(), start=1):
        server.raw.set(raw_key(1), damage(value))
        assert read(tier, 1)[0] is None, name
        assert not server.raw.exists(raw_key(1)), name
        assert tier.figures().corrupt == corrupt, name
        assert_there(tier, put(tier, 1))


@needs_server
def test_something_that_is_no_string_is_a_miss_deleted_and_counted(
    start_servers: StartServers, make_tier: MakeTier
) -> None:
    [server] = start_servers(1)
    tier = make_tier([server])
    server.raw.rpush(raw_key(1), "a list")
    assert read(tier, 1)[0] is None
    assert tier.figures().corrupt == 1
    assert_there(tier, put(tier, 1))


@needs_server
def test_another_blocks_value_is_a_miss(start_servers: StartServers, make_tier: MakeTier) -> None:
    [server] = start_servers(1)
    tier = make_tier([server])
    put(tier, 1, 2)
    server.raw.copy(raw_key(1), raw_key(2), replace=True)
    assert read(tier, 2)[0] is None
    assert tier.figures().corrupt == 1


@needs_server
def test_a_damaged_value_is_read_from_the_other_server(start_servers: StartServers, make_tier: MakeTier) -> None:
    servers = {server.name: server for server in start_servers(2)}
    tier = make_tier(list(servers.values()))
    blocks = put(tier, 1)
    first = servers[tier.placement(key_of(1))[0]]
    first.raw.setrange(raw_key(1), 5000, "?????")
    assert_there(tier, blocks)
    assert not first.raw.exists(raw_key(1))
    assert tier.figures().corrupt == 1
    assert_there(tier, blocks)


# Listeners that are no Redis server

GARBAGE = {
    "http": b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n",
    "bytes": bytes(range(256)) * 4,
    "silence": b"",
    "one line that never ends": b"+" + b"x" * 1000,
    "number that is none": b":one\r\n",
    "length that is none": b"$many\r\n",
    "length beyond everything": b"$" + b"9" * 40 + b"\r\n",
    "negative length": b"$-7\r\n\r\n",
    "number beyond everything": b":" + b"9" * 5000 + b"\r\n",
    "arrays in arrays": b"*1\r\n" * 3000,
    "text where a number is due": b"+OK\r\n+OK\r\n",
    "numbers where text is due": b":1\r\n:1\r\n",
    "map of another protocol": b"%1\r\n+a\r\n+b\r\n",
}


@pytest.mark.parametrize("answer", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_an_error_and_soon(answer: bytes) -> None:
    listener = Listener(answer)
    clock = ManualClock()
    tier = RedisTier([listener.url], timeout_s=TIMEOUT_S, clock=clock)
    calls: list[Callable[[], object]] = [lambda: read(tier, 1), lambda: put(tier, 1)]
    if not answer.startswith(b":1"):
        calls += [lambda: tier.contains([key_of(1)]), lambda: tier.delete([key_of(1)])]
    if answer.startswith(b"+OK"):
        calls.pop(1)  # what is due after a put
    try:
        for call in calls:
            begin_s = time.monotonic()
            with pytest.raises(TierError):
                call()
            assert time.monotonic() - begin_s < TIMEOUT_S + SLACK_S
            clock.advance(LONGEST_PAUSE_S + 1)
    finally:
        tier.close()
        listener.close()


HALVES = {
    "length that is none": b"+string\r\n$many\r\n",
    "length beyond everything": b"+string\r\n$" + b"9" * 40 + b"\r\n",
    "value that does not end": b"+string\r\n$%d\r\n" % (BLOCK_BYTES + HEADER_BYTES) + b"x" * 1000,
    "value that goes on": b"+string\r\n$%d\r\n" % (BLOCK_BYTES + HEADER_BYTES) + b"x" * 2 * BLOCK_BYTES,
    "nothing, and a value": b"+none\r\n$5\r\nthere\r\n",
    "a string, and no value": b"+string\r\n-ERR what\r\n",
    "a type that does not end": b"+" + b"x" * 100_000,
}


@pytest.mark.parametrize("answer", HALVES.values(), ids=HALVES.keys())
def test_half_of_an_answer_is_an_error_and_soon(answer: bytes) -> None:
    listener = Listener(answer)
    tier = RedisTier([listener.url], timeout_s=TIMEOUT_S)
    try:
        begin_s = time.monotonic()
        with pytest.raises(TierError):
            read(tier, 1)
        assert time.monotonic() - begin_s < TIMEOUT_S + SLACK_S
    finally:
        tier.close()
        listener.close()


def test_a_connection_that_is_out_of_step_is_not_kept() -> None:
    listener = Listener(b":1\r\n")
    tier = RedisTier([listener.url], timeout_s=TIMEOUT_S)
    try:
        with pytest.raises(TierError, match="where a type was due"):
            read(tier, 1)
        assert listener.connections[0].recv(1) == b"", "closed, not silent"
    finally:
        tier.close()
        listener.close()


# What cannot be started


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:6379",
        "http://127.0.0.1:6379",
        "redis://",
        "redis:///0",
        "redis://127.0.0.1:port/0",
        "redis://127.0.0.1:99999/0",
        "redis://127.0.0.1/zero",
        "redis://[::1/0",
        "redis://127.0.0.1/0?colour=red",
        "redis://127.0.0.1/0?socket_keepalive=perhaps&db=one",
        "unix://",
    ],
)
def test_a_malformed_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"redis://127\.0\.0\.1:6379/0"):
        RedisTier([url])


@pytest.mark.parametrize(
    ("urls", "options"),
    [
        ([], {}),
        (["redis://a", "redis://:secret@a:6379/0"], {}),
        (["redis://a"], {"replicas": 2}),
        (["redis://a"], {"replicas": 0}),
        (["redis://a"], {"ttl_s": -1.0}),
        (["redis://a"], {"ttl_s": float("nan")}),
        (["redis://a"], {"timeout_s": 0.0}),
    ],
)
def test_impossible_arguments_are_refused(urls: list[str], options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        RedisTier(urls, **options)
    assert "secret" not in str(refused.value)


def test_a_missing_library_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("redis", "redis.connection", "redis.exceptions"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match="pip install redis"):
        RedisTier(["redis://127.0.0.1:6379/0"])
