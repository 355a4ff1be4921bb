"""Hostile input to the zmq transport's socket: dropped and counted; nothing unexpected is written; service goes on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.poll import until
from tests.transport.fuzzing import FRAMES
from tests.transport.memory import Owned
from transport.conformance_pair import finish
from transport.zmq_tcp import ZmqTransport
from transport.zmq_wire import Ask, Data, Hello, Notice, ZmqDescription, decode_description, encode

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Attacked:
    """A receiver that expects block 1, and a stranger's socket that knows the token."""

    def __init__(self) -> None:
        self.receiver = Owned(ZmqTransport("127.0.0.1"), fill=0)
        self.description: ZmqDescription = decode_description(self.receiver.transport.describe())
        self.landing = self.receiver.expect("t", [1])
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.stranger = self._context.socket(zmq.DEALER)
        self.stranger.setsockopt(zmq.LINGER, 0)
        self.stranger.setsockopt(zmq.SNDHWM, 0)
        self.stranger.connect(self.description.address)

    def check_serves(self) -> None:
        """What the stranger sent has been read, nothing but block 1 is written, and a proper peer is served."""
        sender = Owned(ZmqTransport("127.0.0.1"), fill=9)
        landing = self.receiver.expect("proper", [2])
        endpoint = sender.transport.connect(self.receiver.transport.describe())
        finish(endpoint.write("proper", sender.blocks([2]), self.receiver.blocks([2]), b"."))
        assert landing.poll() == [b"."]
        landing.close()
        endpoint.close()
        sender.transport.close()
        assert self.receiver.block(2) == b"\x09" * 4096
        assert all(self.receiver.block(i) == b"\x00" * 4096 for i in (0, 3, 4, 5, 6, 7))

    def malformed(self) -> int:
        return int(self.receiver.transport.malformed)  # type: ignore[attr-defined]

    def close(self) -> None:
        self._context.destroy(0)
        self.receiver.transport.close()


@pytest.fixture(scope="module")
def attacked() -> Iterator[Attacked]:
    attacked = Attacked()
    yield attacked
    attacked.check_serves()
    attacked.close()


@FUZZ
@given(parts=st.lists(st.binary(max_size=200), min_size=1, max_size=6))
def test_random_bytes_are_dropped(attacked: Attacked, parts: list[bytes]) -> None:
    attacked.stranger.send_multipart(parts)


def test_a_deeply_nested_header_and_an_endless_message_are_dropped(attacked: Attacked) -> None:
    before = attacked.malformed()
    attacked.stranger.send_multipart([b"\x91" * 100_000])
    attacked.stranger.send_multipart([b"x"] * 5000)
    until(lambda: attacked.malformed() >= before + 2, what="both are counted")
    attacked.check_serves()


@FUZZ
@given(frame=FRAMES, payload=st.integers(0, 9000) | st.none(), at=st.integers(0, 60), flip=st.integers(0, 255))
def test_mutated_frames_of_a_known_peer_write_nothing_unexpected(
    attacked: Attacked, frame: Data | Notice | Ask, payload: int | None, at: int, flip: int
) -> None:
    attacked.stranger.send(encode(Hello(attacked.description.token)))
    header = bytearray(encode(frame))
    header[at % len(header)] ^= flip
    attacked.stranger.send_multipart([bytes(header)] + ([b"\x07" * payload] if payload is not None else []))


def test_after_all_that_the_thread_still_serves(attacked: Attacked) -> None:
    attacked.check_serves()
    assert attacked.malformed() > 0
