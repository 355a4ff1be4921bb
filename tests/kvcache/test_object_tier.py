"""Blocks in stores of objects: in memory, in a folder, in a server that speaks S3; shared, damaged, gone, hung."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from core.clock import ManualClock
from core.errors import ConfigError
from kvcache import object_looks, object_store, object_tier
from kvcache.conformance import BLOCK_BYTES, block_of, check_tier, key_of, read
from kvcache.faulty_tier import FaultyTier, TierFaults
from kvcache.object_looks import ABSENT_S, LOOKS
from kvcache.object_tier import ObjectTier
from kvcache.tier import TierError
from tests.kvcache.instance import Instance
from tests.kvcache.places import serving
from tests.kvcache.test_hierarchy import ARENA_BYTES, PROMPT
from tests.kvcache.test_peers import check_hits, probes
from tests.poll import until

pytest.importorskip("fsspec")

MakeTier = Callable[..., ObjectTier]


class S3Server:
    """moto's server of S3, with one bucket."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as unused:
            self.port = unused.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(self._has_bucket, what="the S3 server")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def _has_bucket(self) -> bool:
        assert self.process.poll() is None, "the S3 server has ended"
        try:
            urllib.request.urlopen(urllib.request.Request(f"{self.url}/bucket", method="PUT"), timeout=5).close()
        except (urllib.error.URLError, OSError):
            return False
        return True


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def make_tier() -> Iterator[MakeTier]:
    made: list[ObjectTier] = []

    def make(url: str, **more: Any) -> ObjectTier:
        made.append(ObjectTier(url, **more))
        return made[-1]

    yield make
    for tier in made:
        tier.close()


@pytest.fixture(params=["memory", "file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix that is empty, in a store of each kind."""
    return url_in(request, request.param, tmp_path, monkeypatch)


def url_in(request: pytest.FixtureRequest, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    prefix = uuid.uuid4().hex
    if kind == "s3":
        server: S3Server = request.getfixturevalue("s3")
        for name, value in s3_environment(server).items():
            monkeypatch.setenv(name, value)
        return f"s3://bucket/{prefix}"
    return f"memory://{prefix}" if kind == "memory" else f"file://{tmp_path}/{prefix}"


def s3_environment(server: S3Server) -> dict[str, str]:
    """What a user of such a server sets."""
    return {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def put(tier: ObjectTier, *numbers: int) -> dict[int, bytes]:
    blocks = {number: block_of(number) for number in numbers}
    for number, block in blocks.items():
        assert tier.put(key_of(number), number, memoryview(block))
    return blocks


def object_of(tier: ObjectTier, number: int) -> bytes:
    return tier.store.files.cat_file(tier.store.path(key_of(number)))


def test_it_is_a_tier(url: str, make_tier: MakeTier) -> None:
    check_tier(lambda: make_tier(url))


def test_it_still_is_when_every_call_is_late(url: str, make_tier: MakeTier) -> None:
    check_tier(lambda: FaultyTier(make_tier(url), TierFaults(delay_s=0.005)))


def test_hosts_share_blocks_and_see_what_another_adds_and_removes(url: str, make_tier: MakeTier) -> None:
    clock = ManualClock()
    first, second = make_tier(url), make_tier(url, clock=clock)
    blocks = put(first, 1, 2, 3)
    keys = [key_of(number) for number in range(1, 41)]
    until(lambda: second.contains(keys) == 3, what="the first three")
    assert read(second, 2) == (2, blocks[2])
    put(first, *range(4, 40))
    clock.advance(ABSENT_S + 1.0)
    until(lambda: second.contains(keys) == 39, what="all but the last")
    first.delete([key_of(2)])
    assert read(second, 2)[0] is None
    assert second.contains(keys) == 1


def test_a_prefix_that_is_not_there_costs_a_few_looks_and_for_a_while_none(
    make_tier: MakeTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = make_tier(f"memory://{uuid.uuid4().hex}", clock=ManualClock())
    until(lambda: tier._looks.num_pending == 0, what="the greeting")
    looked = counted(tier, monkeypatch)
    for _ in range(5):
        assert tier.contains([key_of(number) for number in range(1000)]) == 0
    assert len(looked) == LOOKS


@pytest.mark.parametrize("num_there", [0, 1, 2, 15, 16, 17, 200, 999, 1000])
def test_a_long_prefix_is_measured_exactly_in_a_few_rounds(
    num_there: int, make_tier: MakeTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    writer, tier = make_tier(url), make_tier(url, clock=ManualClock())
    for number in range(num_there):
        writer.put(key_of(number), number, memoryview(b"x"))
    until(lambda: tier._looks.num_pending == 0, what="the greeting")
    looked = counted(tier, monkeypatch)
    assert tier.contains([key_of(number) for number in range(1000)]) == num_there
    assert len(looked) <= 3 * LOOKS


def test_a_slow_store_delays_a_look_up_by_its_limit_only_and_is_known_the_next_time(
    make_tier: MakeTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    blocks = put(make_tier(url), *range(1, 5))
    tier = make_tier(url)
    until(lambda: tier._looks.num_pending == 0, what="the greeting")
    gate, cat_file = threading.Event(), tier.store.files.cat_file

    def slow(path: str, **more: Any) -> bytes:
        gate.wait(20.0)
        return cat_file(path, **more)

    monkeypatch.setattr(tier.store.files, "cat_file", slow)
    for _ in range(20):
        begun_s = time.monotonic()
        assert tier.contains([key_of(number) for number in blocks]) == 0
        assert time.monotonic() - begun_s < 1.0
    assert tier._looks.num_pending <= 2 * LOOKS, "looks do not pile up"
    gate.set()
    until(lambda: tier.contains([key_of(number) for number in blocks]) == len(blocks), what="what is there")


def counted(tier: ObjectTier, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that the tier reads from now on."""
    looked: list[str] = []
    cat_file = tier.store.files.cat_file

    def count(path: str, **more: Any) -> bytes:
        looked.append(path)
        return cat_file(path, **more)

    monkeypatch.setattr(tier.store.files, "cat_file", count)
    return looked


def test_clear_removes_every_block_and_nothing_else(url: str, make_tier: MakeTier) -> None:
    tier = make_tier(url)
    put(tier, *range(20))
    foreign = tier.store.path(key_of(1)).rpartition("/")[0] + "/notes.txt"
    tier.store.files.pipe_file(foreign, b"somebody's")
    make_tier(url).clear()
    tier.clear()
    assert tier.contains([key_of(1)]) == 0
    assert all(read(tier, number)[0] is None for number in range(20))
    assert tier.store.files.cat_file(foreign) == b"somebody's"
    blocks = put(tier, 1)
    assert read(tier, 1) == (1, blocks[1])


def test_a_block_whose_size_nobody_knows_is_given_whole(make_tier: MakeTier) -> None:
    tier = make_tier(f"memory://{uuid.uuid4().hex}")
    blocks = put(tier, 1, 2)
    assert tier.get_whole(key_of(9), BLOCK_BYTES) is None
    found = tier.get_whole(key_of(1), BLOCK_BYTES)
    assert found is not None
    assert (found[0], bytes(found[1])) == (1, blocks[1])
    assert tier.get_whole(key_of(1), BLOCK_BYTES - 1) is None, "more than was asked for"
    tier.store.files.pipe_file(tier.store.path(key_of(2)), object_of(tier, 2)[:-1])
    assert tier.get_whole(key_of(2), BLOCK_BYTES) is None
    assert (tier.figures().corrupt, tier.contains([key_of(2)])) == (1, 0)


@pytest.mark.parametrize("change", ["flip", "cut", "other", "grow", "empty"])
def test_an_object_that_is_not_what_was_put_is_a_miss_and_is_removed(
    url: str, change: str, make_tier: MakeTier
) -> None:
    tier = make_tier(url)
    put(tier, 1, 2)
    value = object_of(tier, 1)
    flipped = bytearray(value)
    flipped[-100] ^= 1
    changed = {
        "flip": bytes(flipped),
        "cut": value[:-1],
        "other": object_of(tier, 2),
        "grow": value + b"x",
        "empty": b"",
    }
    tier.store.files.pipe_file(tier.store.path(key_of(1)), changed[change])
    assert read(tier, 1)[0] is None
    assert tier.figures().corrupt == 1
    assert tier.contains([key_of(1)]) == 0
    put(tier, 1)
    assert read(tier, 1)[0] == 1


def test_a_file_appears_under_its_name_only_when_it_is_whole(
    tmp_path: Path, make_tier: MakeTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = make_tier(f"file://{tmp_path}/kv")
    pipe_file = tier.store.files.pipe_file

    def torn(path: str, value: bytes) -> None:
        pipe_file(path, value[: len(value) // 2])
        raise OSError("the disk is full")

    monkeypatch.setattr(tier.store.files, "pipe_file", torn)
    with pytest.raises(TierError, match="the disk is full"):
        tier.put(key_of(1), 1, memoryview(block_of(1)))
    assert [path for path in (tmp_path / "kv").rglob("*") if path.is_file()] == []
    assert read(tier, 1)[0] is None


def test_what_is_remembered_is_bounded(make_tier: MakeTier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_looks, "MAX_REMEMBERED", 32)
    tier = make_tier(f"memory://{uuid.uuid4().hex}", clock=ManualClock())
    blocks = put(tier, *range(40))
    assert len(tier._sightings._seen) == 32
    assert tier.contains([key_of(number) for number in range(20, 30)]) == 10
    assert read(tier, 0) == (0, blocks[0])


def test_a_store_that_is_not_there_is_an_error_and_no_hang(
    make_tier: MakeTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("s3fs")
    with socket.create_server(("127.0.0.1", 0)) as unused:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    tier = make_tier("s3://bucket/kv")
    begun_s = time.monotonic()
    for call in (lambda: read(tier, 1), lambda: put(tier, 1)):
        with pytest.raises(TierError, match="s3://bucket/kv cannot be"):
            call()
    until(lambda: tier._looks.num_pending == 0, what="the greeting's failure")
    with pytest.raises(TierError, match="s3://bucket/kv cannot be read from"):
        tier.contains([key_of(1)])
    assert time.monotonic() - begun_s < 10.0


def test_a_store_that_hangs_is_an_error_in_bounded_time_and_good_again_after(
    s3: S3Server, make_tier: MakeTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_environment(s3).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(object_store, "TIMEOUT_S", 0.3)
    tier = make_tier(f"s3://bucket/{uuid.uuid4().hex}")
    blocks = put(tier, 1)
    os.kill(s3.process.pid, signal.SIGSTOP)
    try:
        begun_s = time.monotonic()
        with pytest.raises(TierError, match="cannot be read from"):
            read(tier, 1)
        assert time.monotonic() - begun_s < 5.0
    finally:
        os.kill(s3.process.pid, signal.SIGCONT)
    assert read(tier, 1) == (1, blocks[1])


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://", "names no place in a store"),
        ("nonsense://x/y", "nonsense"),
        ("file://", "names no place"),
    ],
)
def test_what_is_no_store_is_refused(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ObjectTier(url)


def test_after_close_every_call_is_an_error(make_tier: MakeTier) -> None:
    tier = make_tier(f"memory://{uuid.uuid4().hex}")
    put(tier, 1)
    tier.close()
    for call in (lambda: read(tier, 1), lambda: put(tier, 2), lambda: tier.contains([key_of(7)])):
        with pytest.raises(TierError, match="closed"):
            call()
    tier.close()


def test_a_server_keeps_blocks_in_s3_and_another_finds_them(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_environment(s3).items():
        monkeypatch.setenv(name, value)
    word = f"s3://bucket/{uuid.uuid4().hex}"
    with serving(tmp_path, ARENA_BYTES, word) as server:
        instance = Instance(server.socket)
        blocks = [instance.engine.fill(index, number) for index, number in enumerate(PROMPT)]
        tries = iter(range(1000))

        def is_stored() -> bool:
            """Before the client of S3 is there, a request does not wait for it, and is not stored either."""
            request = f"try{next(tries)}"
            instance.arrive(request, PROMPT)
            num_stored = instance.compute(request, PROMPT, len(PROMPT))
            instance.finish(request)
            return num_stored == len(PROMPT)

        until(is_stored, what="the prompt's blocks in the arena")
        until(lambda: server.figures()["object_puts"] == len(PROMPT), what="the blocks in S3")
        instance.close()
    with serving(tmp_path, ARENA_BYTES, word) as server:
        until(lambda: server.figures()["object_hits"] == len(PROMPT) or probes(server), what="blocks from S3")
        check_hits(server, blocks, "host", PROMPT)
        assert server.figures()["object_hits"] == len(PROMPT)


def test_blocks_are_as_large_as_they_are(make_tier: MakeTier) -> None:
    tier = make_tier(f"memory://{uuid.uuid4().hex}")
    put(tier, 1)
    assert len(object_of(tier, 1)) == object_tier.HEADER_BYTES + BLOCK_BYTES
