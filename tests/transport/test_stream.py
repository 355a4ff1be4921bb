"""Messages and blocks over a stream: whole and in order, or an error in bounded time."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import xxhash

from core.errors import ConfigError, TransferError
from transport.stream import CHUNK_BYTES, MAX_MESSAGE_BYTES, Stream, StreamServer

TIMEOUT_S = 5.0


@pytest.fixture
def pair() -> Iterator[tuple[Stream, Stream]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = Stream.connect("127.0.0.1", listener.getsockname()[1], TIMEOUT_S)
        far = Stream(listener.accept()[0])
    yield near, far
    near.close()
    far.close()


@pytest.mark.parametrize("num_bytes", [1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 5 << 20])
def test_a_block_arrives_whole_between_messages_with_the_same_digest(
    pair: tuple[Stream, Stream], num_bytes: int
) -> None:
    near, far = pair
    block, into = os.urandom(num_bytes), bytearray(num_bytes)
    digests: list[int] = []

    def send() -> None:
        near.send(b"before", TIMEOUT_S)
        digests.append(near.send_block(memoryview(block), TIMEOUT_S))
        near.send(b"", TIMEOUT_S)

    sending = threading.Thread(target=send)
    sending.start()
    assert far.receive(TIMEOUT_S) == b"before"
    digests.append(far.receive_block(memoryview(into), TIMEOUT_S))
    assert far.receive(TIMEOUT_S) == b""
    sending.join()
    assert into == block
    assert digests == [xxhash.xxh3_64_intdigest(block)] * 2


def test_a_peer_that_trickles_is_given_up_on_in_time(pair: tuple[Stream, Stream]) -> None:
    near, far = pair
    stop = threading.Event()

    def trickle() -> None:
        while not stop.wait(0.01):
            near._connection.send(b"x")

    trickling = threading.Thread(target=trickle)
    trickling.start()
    begun_s = time.monotonic()
    with pytest.raises(TransferError, match=r"too long|timed out"):
        far.receive_block(memoryview(bytearray(1 << 20)), 0.3)
    assert time.monotonic() - begun_s < 1.0
    stop.set()
    trickling.join()


def test_a_peer_that_does_not_read_is_given_up_on_in_time(pair: tuple[Stream, Stream]) -> None:
    begun_s = time.monotonic()
    with pytest.raises(TransferError, match=r"too long|timed out"):
        pair[0].send_block(memoryview(bytes(64 << 20)), 0.3)
    assert time.monotonic() - begun_s < 1.0


def test_the_end_of_a_stream_and_messages_that_are_too_large_are_errors(pair: tuple[Stream, Stream]) -> None:
    near, far = pair
    near._connection.sendall((MAX_MESSAGE_BYTES + 1).to_bytes(2, "little"))
    with pytest.raises(TransferError, match="is larger than"):
        far.receive(TIMEOUT_S)
    near._connection.sendall(b"\x05\0abc")
    near.close()
    with pytest.raises(TransferError, match="has ended"):
        far.receive(TIMEOUT_S)


def test_nobody_there_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(TransferError, match=rf"cannot connect to 127\.0\.0\.1:{port}"):
        Stream.connect("127.0.0.1", port, TIMEOUT_S)
    with pytest.raises(ConfigError, match=r"cannot listen on '192\.0\.2\.1'"):
        StreamServer("192.0.2.1", lambda stream: None, 1)


def test_a_server_serves_each_stream_in_a_thread_up_to_its_limit_and_its_close_ends_them() -> None:
    def echo(stream: Stream) -> None:
        while True:
            stream.send(stream.receive(TIMEOUT_S), TIMEOUT_S)

    server = StreamServer("127.0.0.1", echo, 2)
    server.start()
    streams = []
    for number in range(2):
        streams.append(Stream.connect("127.0.0.1", server.port, TIMEOUT_S))
        streams[-1].send(b"%d" % number, TIMEOUT_S)
        assert streams[-1].receive(TIMEOUT_S) == b"%d" % number
    third = Stream.connect("127.0.0.1", server.port, TIMEOUT_S)
    with pytest.raises(TransferError, match=r"ended|broke"):
        third.receive(TIMEOUT_S)
    server.close()
    for stream in streams:
        with pytest.raises(TransferError, match=r"ended|broke"):
            stream.receive(TIMEOUT_S)
        stream.close()
    third.close()
