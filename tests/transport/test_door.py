"""The two halves of one instance talk without an engine step, and neither is held up by the other."""

from __future__ import annotations

import os
import threading

import pytest

from core.errors import TransferError
from core.handoff import Peer
from core.path import Path, PathState
from tests.poll import until
from transport.door import MAX_WORD_BYTES, MAX_WORDS, Await, Door, DoorKey, Meet, Named, News, Word

PEER = Peer("d", "tcp://127.0.0.1:1", "boot-d")


def test_words_arrive_in_order_both_ways() -> None:
    door = Door()
    key = DoorKey(door.address)
    said: list[Word] = [Named("p"), Await("q"), Meet(PEER, [("shm", b"\x00\xff"), ("zmq", b"")])]
    for word in said:
        key.say(word)
    heard: list[Word] = []

    def all_heard() -> bool:
        heard.extend(door.hear(0.1))
        return len(heard) == len(said)

    until(all_heard, 5.0, "three words")
    assert heard == said
    news = News(True, [Path("d", "boot-d", "zmq", PathState.CHOSEN, 1.5, 2.5, 30.0, 1, "why")])
    door.say(news)
    assert until(key.listen, 5.0, "news") == [news]
    key.close()
    door.close()


def test_a_worker_that_does_not_listen_holds_nobody_up() -> None:
    door = Door()
    key = DoorKey(door.address)
    many = [Meet(PEER, [("shm", bytes(50_000))]) for _ in range(100)]
    for word in many:
        key.say(word)
    heard: list[Word] = []

    def all_heard() -> bool:
        heard.extend(door.hear(0.01))
        key.listen()
        return len(heard) == len(many)

    until(all_heard, 10.0, "what was said meanwhile")
    for _ in range(MAX_WORDS + 10):
        key.say(Named("x" * 1000))
    key.say(Named("x" * MAX_WORD_BYTES))
    key.say(Named("after all that"))
    heard.clear()

    def is_last_heard() -> bool:
        heard.extend(door.hear(0.01))
        key.listen()
        return heard[-1:] == [Named("after all that")]

    until(is_last_heard, 10.0, "the last word")
    assert len(heard) <= MAX_WORDS + 200, "what waits is bounded, and the oldest went"
    assert max(len(word.boot_id) for word in heard if isinstance(word, Named)) == 1000, "what is too large is dropped"
    key.close()
    door.close()


def test_a_closed_door_is_an_error_and_a_lost_half_is_none() -> None:
    door = Door()
    key = DoorKey(door.address)
    door.hear(0.1)
    key.close()
    until(lambda: door.hear(0.01) or not door.is_attended(), 5.0, "the other half's end is seen")
    door.say(News(True, []))
    door.close()
    door.wake()
    with pytest.raises(TransferError, match="cannot reach this instance's worker"):
        DoorKey(door.address)


def test_it_leaves_no_descriptors_and_can_be_woken() -> None:
    before = len(os.listdir("/proc/self/fd"))
    door = Door()
    threading.Timer(0.05, door.wake).start()
    assert door.hear(20.0) == []
    key = DoorKey(door.address)
    door.hear(0.1)
    key.close()
    door.close()
    assert len(os.listdir("/proc/self/fd")) == before
