"""What becomes of answers that come late or to nobody: whatever they hold at the server is given back, once.

The client is real; the server is this test, word by word, so that the order is exact.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.clock import ManualClock
from kvcache import wire
from kvcache.breaker import FAILURES, Breaker
from kvcache.client import CacheClient
from kvcache.keys import join_keys
from kvcache.look_up import Desk, LookUp, Stage
from kvcache.pace import Pace
from kvcache.partial import PartialBlocks, root_key
from kvcache.prompt import KeyedPrompt
from tests.kvcache.places import BLOCK_BYTES, SPACE, key
from tests.poll import until
from transport.mapping import make_memfd

BLOCK_SIZE = 32
KEYS = [key(number) for number in (1, 2, 3)]
TOKENS = [7] * (3 * BLOCK_SIZE + 20)
SLOTS = [wire.Slot(index * 4096, index) for index in range(3)]
QUIET_S = 0.05


class ScriptedServer:
    """Says and hears what the test wants."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._listener.settimeout(10.0)
        self._connection: socket.socket | None = None

    def welcome(self) -> None:
        self._connection, _ = self._listener.accept()
        self._connection.settimeout(10.0)
        fd = make_memfd(BLOCK_BYTES)
        socket.send_fds(self._connection, [b"b"], [fd])
        os.close(fd)
        assert isinstance(self.hear(), wire.Hello)
        self.say(wire.Welcome("arena", BLOCK_BYTES))

    def hear(self) -> wire.ToServer:
        return wire.decode_at_server(self._exactly(wire.frame_bytes(self._exactly(wire.LENGTH.size))))

    def hears_no_more(self) -> bool:
        assert self._connection is not None
        self._connection.settimeout(QUIET_S)
        try:
            return not self._connection.recv(1)
        except TimeoutError:
            return True
        finally:
            self._connection.settimeout(10.0)

    def say(self, message: wire.ToClient) -> None:
        assert self._connection is not None
        self._connection.sendall(wire.frame(message))

    def close(self) -> None:
        for each in (self._connection, self._listener):
            if each is not None:
                each.close()

    def _exactly(self, num_bytes: int) -> bytes:
        assert self._connection is not None
        data = b""
        while len(data) < num_bytes:
            chunk = self._connection.recv(num_bytes - len(data))
            assert chunk, "the client has hung up"
            data += chunk
        return data


class Asking:
    """A desk, and the server that it asks."""

    def __init__(self, folder: Path) -> None:
        self.server = ScriptedServer(folder / "cache.sock")
        self.clock = ManualClock()
        self.client = CacheClient(str(folder / "cache.sock"), wire.Hello("engine", "boot", BLOCK_BYTES))
        self.server.welcome()
        until(lambda: self.client.is_connected, what="the connection")
        self.breaker = Breaker(self.clock)
        self.desk = Desk(self.client, self.clock, self.breaker, Pace(self.clock), BLOCK_SIZE, 0.1)

    def ask(self) -> tuple[LookUp, int]:
        """A look-up of three blocks and 20 tokens more, which stores what is not there, and its number."""
        partials = PartialBlocks(root_key(SPACE, ""), KEYS, TOKENS, BLOCK_SIZE)
        look_up = LookUp.ask(self.desk, KeyedPrompt("r", len(TOKENS), KEYS, partials), reserve=True)
        question = self.server.hear()
        assert look_up is not None
        assert isinstance(question, wire.Search)
        assert not look_up.hear()
        return look_up, question.id

    def is_told(self, *messages: wire.ToServer) -> None:
        """In this order, and nothing else."""
        assert [self.server.hear() for _ in messages] == list(messages)
        assert self.server.hears_no_more()

    def close(self) -> None:
        self.server.close()
        self.client.close()


@pytest.fixture
def asking(tmp_path: Path) -> Iterator[Asking]:
    asking = Asking(tmp_path)
    yield asking
    asking.close()


def heard(look_up: LookUp) -> None:
    until(look_up.hear, what="the answer")


PLACE = wire.Abandon(join_keys(KEYS[2:]))
GRANTED = [wire.Grant(2, 8192)]


def test_an_answer_to_a_request_that_has_ended_gives_back_pins_and_places(asking: Asking) -> None:
    look_up, number = asking.ask()
    look_up.leave()
    asking.server.say(wire.Found(number, SLOTS[:1], coming=1))  # not the last word
    assert asking.server.hears_no_more()
    asking.server.say(wire.Found(number, SLOTS[:2], GRANTED))
    asking.is_told(PLACE, wire.Release(number))


def test_an_answer_that_nobody_waited_for_gives_back_pins_and_places(asking: Asking) -> None:
    look_up, number = asking.ask()
    asking.clock.advance(0.2)
    assert look_up.hear()
    assert look_up.stage is Stage.OVER
    asking.server.say(wire.Found(number, SLOTS[:2], GRANTED))
    asking.is_told(PLACE, wire.Release(number))
    look_up.leave()
    assert asking.server.hears_no_more()


def test_what_came_at_once_is_used_and_pinned_until_its_end_while_the_rest_comes_too_late(asking: Asking) -> None:
    look_up, number = asking.ask()
    asking.server.say(wire.Found(number, SLOTS[:1], coming=1))
    until(lambda: not look_up.hear() and look_up.stage is Stage.COMING, what="the first answer")
    asking.clock.advance(5.0)
    assert look_up.hear()
    assert (look_up.stage, look_up.num_tokens(0, len(TOKENS))) == (Stage.KNOWN, BLOCK_SIZE)
    asking.server.say(wire.Found(number, SLOTS[:2], GRANTED))
    asking.is_told(PLACE)  # and not yet Release: its first block is still to be loaded
    look_up.end()
    asking.is_told(wire.Release(number))


def test_the_place_of_the_prompts_end_is_given_back_when_it_comes_too_late_or_to_nobody(asking: Asking) -> None:
    for waits in (True, False):
        look_up, number = asking.ask()
        asking.server.say(wire.Found(number, SLOTS, has_partial=True))
        until(lambda: not look_up.hear() and look_up.stage is Stage.PARTIAL, what="the question for the end")  # noqa: B023
        question = asking.server.hear()
        assert isinstance(question, wire.SearchPartial)
        end = wire.Abandon(look_up._prompt.partials.last)
        if waits:
            asking.clock.advance(0.2)
            assert look_up.hear()
            assert look_up.stage is Stage.KNOWN
            asking.is_told(wire.Release(question.id))
        else:
            look_up.leave()
            asking.is_told(wire.Release(number), wire.Release(question.id))
        asking.server.say(wire.Found(question.id, grants=[wire.Grant(0, 4096)]))
        asking.is_told(end)


def test_a_late_answer_closes_the_breaker(asking: Asking) -> None:
    numbers = []
    for _ in range(FAILURES):
        look_up, number = asking.ask()
        asking.clock.advance(0.2)
        assert look_up.hear()
        numbers.append(number)
    assert asking.breaker.is_open
    asking.server.say(wire.Found(numbers[-1]))
    until(lambda: not asking.breaker.is_open, what="the breaker")


def test_of_another_connection_nothing_is_given_back(asking: Asking) -> None:
    """The server has given up all that was held when it hung up."""
    look_up, number = asking.ask()
    asking.server._connection.close()  # type: ignore[union-attr]
    asking.server.welcome()
    until(lambda: asking.client.epoch == 2, what="the next connection")
    look_up.leave()
    asking.server.say(wire.Found(number, SLOTS, GRANTED))
    assert asking.server.hears_no_more()
    assert look_up.take_grants() == []
