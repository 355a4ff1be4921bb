"""`baton cache` by hand, and what `--cache` may say."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.processes import group_members
from core.errors import ConfigError
from kvcache import wire
from kvcache.client import CacheClient, ask_figures
from kvcache.keys import join_keys
from kvcache.spec import CacheSpec, DiskSpec, ObjectSpec, PeersSpec, RedisSpec
from tests.cluster.test_command import baton
from tests.kvcache.places import key
from tests.poll import until


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("8GiB", 8 << 30), ("8g", 8 << 30), ("512MiB", 512 << 20), ("1.5 GB", 3 << 29), ("1048576", 1 << 20)],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert CacheSpec.parse(text) == CacheSpec(num_bytes=num_bytes, text=text)


def test_tiers_below_the_arena() -> None:
    spec = CacheSpec.parse("8GiB,disk=/mnt/kv:100GiB,redis://10.0.0.1:6379,redis://10.0.0.2:6379")
    assert spec.num_bytes == 8 << 30
    both = RedisSpec(("redis://10.0.0.1:6379", "redis://10.0.0.2:6379"))
    assert spec.tiers == (DiskSpec("/mnt/kv", 100 << 30), both)


def test_any_other_url_is_a_store_of_objects() -> None:
    assert CacheSpec.parse("8GiB,s3://bucket/kv").tiers == (ObjectSpec("s3://bucket/kv"),)
    assert CacheSpec.parse("8GiB,file:///mnt/nfs/kv").tiers == (ObjectSpec("file:///mnt/nfs/kv"),)


def test_peers_are_one_tier_and_listen_is_none() -> None:
    spec = CacheSpec.parse("8GiB,listen=10.0.0.5:7600,peer=10.0.0.6:7600,peer=[fd00::7]:7600,disk=/mnt/kv:1GiB")
    assert spec.listen == "10.0.0.5:7600"
    assert spec.tiers == (PeersSpec(("10.0.0.6:7600", "[fd00::7]:7600")), DiskSpec("/mnt/kv", 1 << 30))
    assert CacheSpec.parse("8GiB,listen=127.0.0.1:0").tiers == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("8GiB,disk=kv:1GiB", "neither disk=/FOLDER:SIZE"),
        ("8GiB,tape=/x:1GiB", "neither disk=/FOLDER:SIZE"),
        ("8GiB,disk=/x:lots", "'lots' is not a size such as 100GiB"),
        ("8GiB,disk=/x:/y", "'/y' is not a size such as 100GiB"),
        ("unix:/x,disk=/x:1GiB", "give its socket alone"),
        ("8GiB,peer=10.0.0.6", "'10.0.0.6' is not HOST:PORT, such as 10.0.0.5:7600"),
        ("8GiB,peer=10.0.0.6:0", "'10.0.0.6:0' is not HOST:PORT"),
        ("8GiB,peer=10.0.0.6:99999", "'10.0.0.6:99999' is not HOST:PORT"),
        ("8GiB,listen=:7600", "':7600' is not HOST:PORT"),
        ("8GiB,peer=a:1,peer=a:1", "the peer a:1 is named twice"),
        ("8GiB,peer=a:1,disk=/x:1GiB,peer=b:1", "peer=b:1 stands apart from the other peers"),
        ("8GiB,listen=a:1,listen=b:1", "'listen=b:1' is one too many"),
        ("8GiB,s3://b/p,file:///x", "'file:///x' is one too many"),
        ("8", "did you mean 8GiB?"),
        ("8 apples", "not a size such as 8GiB, or unix:"),
        ("unix:relative/path", "an absolute path"),
        ("-4GiB", "not a size"),
    ],
)
def test_other_words_are_refused_with_the_form_that_is_expected(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        CacheSpec.parse(text)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "1P1D", "--cache", "9000GiB"], "lower --kv-cache-memory-bytes or --cache"),
        (["serve", "1P1D", "--cache", "8"], "did you mean 8GiB?"),
        (["cache"], "serve, stats, drop"),
        (["cache", "serve", "unix:/x"], "needs a size"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments: list[str], said: str) -> None:
    result = baton(*arguments)
    assert result.returncode == 2, result.stderr
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`baton cache serve` on a socket of its own."""
    socket = str(tmp_path / "cache.sock")
    process = subprocess.Popen(
        [sys.executable, "-m", "baton", "cache", "serve", "8MiB", "--socket", socket],
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(Path(__file__).resolve().parents[2])),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == f"ready unix:{socket}\n"
    yield socket, process
    process.terminate()
    process.wait(20)
    process.stdout.close()
    assert not Path(socket).exists(), "nothing is left"


def one_block_stored(socket: str) -> CacheClient:
    """A client that has committed a block."""
    client = CacheClient(socket, wire.Hello("engine", "boot", 4096))
    until(lambda: client.is_connected, what="the connection")
    number = client.reserve(join_keys([key(1)]))
    granted = until(lambda: client.take(number), what="the place")
    assert isinstance(granted, wire.Granted)
    client.send(wire.Commit([wire.Written(key(1), granted.grants[0].offset, 5)]))
    until(lambda: ask_figures(socket)["blocks"] == 1, what="the commit")
    return client


def test_serve_stats_and_drop(served: tuple[str, subprocess.Popen[str]]) -> None:
    socket, _ = served
    client = one_block_stored(socket)
    shown = baton("cache", "stats", "--socket", socket)
    assert ["blocks", "1"] in [line.split() for line in shown.stdout.splitlines()]
    dropped = baton("cache", "drop", "--socket", socket)
    assert ["blocks", "0"] in [line.split() for line in dropped.stdout.splitlines()]
    again = baton("cache", "serve", "8MiB", "--socket", socket)
    assert (again.returncode, "already" in again.stderr) == (2, True)
    client.close()


def test_a_killed_server_is_started_again_with_what_it_held(served: tuple[str, subprocess.Popen[str]]) -> None:
    socket, process = served
    client = one_block_stored(socket)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    others = [pid for group in children for pid in group_members(int(group))]
    assert others or children
    for pid in {*others, *map(int, children)}:
        os.kill(pid, signal.SIGKILL)
    until(lambda: client.epoch == 2, what="the new server")
    assert ask_figures(socket)["taken_over_blocks"] == 1
    client.close()


def test_nobody_there_is_one_line(tmp_path: Path) -> None:
    result = baton("cache", "stats", "--socket", str(tmp_path / "none"))
    assert result.returncode == 1
    assert "cannot reach the cache server" in result.stderr
    assert len(result.stderr.splitlines()) == 1
