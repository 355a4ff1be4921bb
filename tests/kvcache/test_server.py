"""A real server process: what clients see, and what is left when either side dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.errors import TransferError
from kvcache import wire
from kvcache.client import CacheClient, ask_figures, drop_all, fetch_arena, labels
from kvcache.keys import join_keys
from tests.kvcache.places import BLOCK_BYTES, Server, key, serving
from tests.poll import until

ARENA_BYTES = 64 * BLOCK_BYTES


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path, ARENA_BYTES) as running:
        yield running


def connect(server: Server, name: str = "engine") -> CacheClient:
    client = CacheClient(server.socket, wire.Hello(name, "boot", BLOCK_BYTES))
    until(lambda: client.is_connected, what="the connection")
    return client


def answer(client: CacheClient, number: int) -> wire.Found | wire.Granted:
    assert number, "nobody could be asked"
    result = until(lambda: client.take(number), what="the answer")
    assert result is not None
    return result


def chain(*numbers: int) -> bytes:
    return join_keys(key(n) for n in numbers)


def store(client: CacheClient, *numbers: int) -> None:
    """Returns when everybody can find them: one connection's words are obeyed in order."""
    granted = answer(client, client.reserve(chain(*numbers)))
    assert isinstance(granted, wire.Granted)
    client.send(wire.Commit([wire.Written(key(numbers[g.index]), g.offset, 7) for g in granted.grants]))
    assert found(client, *numbers) == len(numbers)


def found(client: CacheClient, *numbers: int) -> int:
    result = answer(client, client.search(chain(*numbers), reserve=False))
    assert isinstance(result, wire.Found)
    return len(result.slots)


def test_what_one_stores_another_finds_and_the_rest_is_granted(server: Server) -> None:
    writer, reader = connect(server, "a"), connect(server, "b")
    store(writer, 1, 2)
    result = answer(reader, reader.search(chain(1, 2, 3, 4), reserve=True))
    assert isinstance(result, wire.Found)
    assert [slot.digest for slot in result.slots] == [7, 7]
    assert [grant.index for grant in result.grants] == [2, 3]
    assert found(writer, 3) == 0, "reserved is not complete"
    writer.close()
    reader.close()


def test_what_a_killed_engine_held_comes_back_and_what_it_stored_stays(server: Server) -> None:
    script = Path(__file__).with_name("client_process.py")
    with subprocess.Popen(
        [sys.executable, str(script), server.socket],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert server.figures()["reserved_bytes"] > 0
        process.kill()
        process.wait()
    until(lambda: server.figures()["reserved_bytes"] + server.figures()["cooling_bytes"] == 0, 5.0, "the reservations")
    client = connect(server)
    assert found(client, 1, 2) == 2
    client.close()


def test_a_restarted_server_takes_the_arena_over(server: Server) -> None:
    client = connect(server)
    store(client, 1, 2, 3)
    client.send(wire.Name("doc", chain(1, 2), 32, ttl_s=600.0, pin=True))
    until(lambda: found(client, 1, 2, 3) == 3, what="the commit")
    until(lambda: labels(server.socket), what="the label")
    arena, epoch = client.arena_id, client.epoch
    server.kill()
    until(lambda: not client.is_connected, what="the end of the connection")
    assert client.search(chain(1), reserve=False) == 0, "nobody can be asked"
    assert not client.send(wire.Touch(chain(1)))
    assert "3 blocks taken over" in server.start()
    until(lambda: client.is_connected, what="the new connection")
    assert (client.arena_id, client.epoch) == (arena, epoch + 1)
    assert found(client, 1, 2, 3) == 3
    (label,) = labels(server.socket)
    assert (label.name, label.blocks, label.num_tokens, label.pinned) == ("doc", 2, 32, True)
    client.close()


def test_a_server_that_hangs_never_blocks_an_engine(server: Server) -> None:
    client = connect(server)
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGSTOP)
    begun_s = time.monotonic()
    try:
        asked = [client.search(chain(*range(200)), reserve=True) for _ in range(3000)]
        assert time.monotonic() - begun_s < 5.0
        assert 0 in asked, "the outbox is bounded"
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    until(lambda: client.take(asked[0]), what="the late answer")
    client.close()


def test_garbage_ends_one_connection_and_nothing_else(server: Server) -> None:
    client = connect(server)
    store(client, 1)
    words = [
        b"",
        b"\0\0\0\0",
        b"\xff\xff\xff\xff",
        wire.LENGTH.pack(5) + b"hello",
        wire.frame(wire.Search(1, b"1234")),
        wire.frame(wire.Hello("x", "y", version=99)),
        wire.frame(wire.Hello("x", "y", BLOCK_BYTES)) + wire.frame(wire.Search(1, b"odd")),
        wire.frame(wire.Hello("x", "y", BLOCK_BYTES)) + wire.frame(wire.Hello("x", "y")),
        wire.frame(wire.Hello("x", "y")) + wire.frame(wire.Reserve(1, chain(5))),
        wire.frame(wire.Hello("x", "y", BLOCK_BYTES)) + wire.frame(wire.Commit([wire.Written(b"?", -5, 1)])),
        wire.frame(wire.Hello("x", "y", BLOCK_BYTES)) + os.urandom(300),
    ]
    for word in words:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
            stranger.connect(server.socket)
            stranger.sendall(word)
            stranger.shutdown(socket.SHUT_WR)
            stranger.settimeout(5.0)
            while stranger.recv(4096):
                pass
    assert found(client, 1) == 1
    client.close()


def test_a_block_larger_than_the_arena_and_another_version_are_refused_with_both_values(server: Server) -> None:
    client = CacheClient(server.socket, wire.Hello("big", "boot", ARENA_BYTES + 1))
    until(lambda: client.why_refused, what="the refusal")
    assert str(ARENA_BYTES) in client.why_refused
    assert str(ARENA_BYTES + 1) in client.why_refused
    assert not client.is_connected
    client.close()


def test_drop_forgets_everything(server: Server) -> None:
    client = connect(server)
    store(client, 1, 2)
    until(lambda: found(client, 1, 2) == 2, what="the commit")
    assert drop_all(server.socket)["blocks"] == 0
    assert found(client, 1) == 0
    client.close()


def test_nobody_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match=r"cannot reach the cache server at .*nowhere"):
        ask_figures(str(tmp_path / "nowhere"))
    with pytest.raises(TransferError, match="cannot reach the cache server"):
        fetch_arena(str(tmp_path / "nowhere"), "engine")


def test_a_second_server_at_one_socket_is_refused(server: Server) -> None:
    other = Server(Path(server.socket).parent, ARENA_BYTES)
    command = [sys.executable, "-P", "-m", "kvcache", "--socket", server.socket]
    command += ["--arena-fd", str(other._fds.arena), "--ledger-fd", str(other._fds.ledger)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        pass_fds=(other._fds.arena, other._fds.ledger),
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 1
    assert "is listening at" in done.stderr
    assert "Traceback" not in done.stderr
    assert server.is_up()
    other.close()
