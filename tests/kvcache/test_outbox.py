"""Words into one socket from many threads: whole, in order, whatever the socket takes at once."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from kvcache.outbox import MAX_BYTES, Outbox
from tests.poll import until

NUM_THREADS, NUM_WORDS = 4, 400
WORD = 1000
"""Bytes: many of them are more than the socket's buffer has room for, so some go in parts."""


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    theirs.settimeout(10)
    with ours, theirs:
        yield ours, theirs


def word(thread: int, number: int) -> bytes:
    return b"%02d%05d" % (thread, number) * (WORD // 7) + b"." * (WORD % 7)


def test_words_of_many_threads_arrive_whole_and_each_threads_in_order(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = ends
    outbox = Outbox()
    outbox.open(ours)
    ended = threading.Event()

    def put(thread: int) -> None:
        for number in range(NUM_WORDS):
            assert outbox.put(word(thread, number))

    def send_the_rest() -> None:
        sending = memoryview(b"")
        while not ended.is_set():
            sending = sending or outbox.next()
            try:
                sending = sending[ours.send(sending) :]
            except BlockingIOError:
                ended.wait(0.0005)

    threads = [threading.Thread(target=put, args=(thread,)) for thread in range(NUM_THREADS)]
    sender = threading.Thread(target=send_the_rest)
    for started in (*threads, sender):
        started.start()
    received = b""
    while len(received) < NUM_THREADS * NUM_WORDS * WORD:
        received += theirs.recv(1 << 16)
    for putting in threads:
        putting.join()
    until(lambda: not outbox.is_behind, what="nothing is left")
    ended.set()
    sender.join()
    words = [received[at : at + WORD] for at in range(0, len(received), WORD)]
    for thread in range(NUM_THREADS):
        its = [heard for heard in words if heard.startswith(b"%02d" % thread)]
        assert its == [word(thread, number) for number in range(NUM_WORDS)]


def test_what_the_socket_takes_needs_nobody_else(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    outbox = Outbox()
    outbox.open(ours)
    assert outbox.put(b"hello")
    assert theirs.recv(100) == b"hello"
    assert not outbox.is_behind


def test_a_peer_that_does_not_read_costs_a_bounded_queue(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, _ = ends
    outbox = Outbox()
    outbox.open(ours)
    taken = 0
    while outbox.put(bytes(1 << 16)) and taken < 2 * MAX_BYTES:
        taken += 1 << 16
    assert MAX_BYTES // 2 < taken < MAX_BYTES + (1 << 20)


def test_nothing_of_one_connection_goes_into_the_next(ends: tuple[socket.socket, socket.socket]) -> None:
    outbox = Outbox()
    assert not outbox.put(b"nobody is there")
    outbox.open(ends[0])
    while not outbox.is_behind:
        outbox.put(bytes(1 << 16))
    outbox.close()
    assert not outbox.put(b"nobody is there")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        outbox.open(ours)
        outbox.put(b"new")
        assert theirs.recv(100) == b"new"
        assert not outbox.next()
