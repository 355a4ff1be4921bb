"""Hostile input to the ucx transport: at its door, at UCX's own port, and from a peer that knows the token."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.poll import until
from tests.transport.fuzzing import UCX_FRAMES
from tests.transport.memory import Owned
from tests.transport.ucx_stranger import Stranger
from transport import schemes
from transport.conformance_pair import finish
from transport.frames import Ask, Notice
from transport.ucx import UcxTransport
from transport.ucx_library import Lease
from transport.ucx_wire import (
    MAX_MESSAGE_BYTES,
    Parcel,
    Part,
    UcxDescription,
    batch,
    decode_description,
    encode,
    encode_greeting,
    hello,
    welcome,
)
from transport.ucx_worker import UcxWorker

pytestmark = [
    pytest.mark.ucx,
    pytest.mark.skipif(bool(schemes.unavailable("ucx")), reason=schemes.unavailable("ucx")),
]
FUZZ = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Attacked:
    """A receiver that expects block 1, and a stranger with a UCX worker of its own."""

    def __init__(self) -> None:
        self.receiver = Owned(UcxTransport("127.0.0.1"), fill=0)
        self.description: UcxDescription = decode_description(self.receiver.transport.describe())
        self.landing = self.receiver.expect("t", [1])
        self._lease = Lease("127.0.0.1")
        self.worker = UcxWorker(self._lease)

    def check_serves(self) -> None:
        """Nothing but block 1 is written, and a proper peer is served."""
        sender = Owned(UcxTransport("127.0.0.1"), fill=9)
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
        self.receiver.transport.close()
        self._lease.give_back()


@pytest.fixture(scope="module")
def attacked() -> Iterator[Attacked]:
    attacked = Attacked()
    yield attacked
    attacked.check_serves()
    attacked.close()


@FUZZ
@given(garbage=st.binary(max_size=300), is_framed=st.booleans())
def test_random_bytes_at_the_door_are_hung_up_on(attacked: Attacked, garbage: bytes, is_framed: bool) -> None:
    _, _, port = attacked.description.address.rpartition(":")
    with socket.create_connection(("127.0.0.1", int(port)), 5.0) as stranger:
        greeting = encode_greeting(hello("guess", b"address", 1))
        stranger.sendall((greeting[:14] if is_framed else b"") + garbage)


def test_a_guessed_token_never_reaches_ucx(attacked: Attacked) -> None:
    before = attacked.malformed()
    _, _, port = attacked.description.address.rpartition(":")
    with socket.create_connection(("127.0.0.1", int(port)), 5.0) as stranger:
        stranger.settimeout(5.0)
        stranger.sendall(encode_greeting(hello("guess", b"\x00" * 100, 1)))
        assert b"token" in b"".join(iter(lambda: stranger.recv(4096), b""))
    assert attacked.malformed() > before


def test_a_listener_that_does_not_know_the_token_is_not_believed(attacked: Attacked) -> None:
    """Its UCX address is garbage: UCX itself would abort the process over it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        liar = msgspec.structs.replace(attacked.description, address=address)
        endpoint = attacked.receiver.transport.connect(encode(liar))
        connection, _ = listener.accept()
        connection.sendall(encode_greeting(welcome("guess", os.urandom(100), 1)))
        until(endpoint.failure, 5.0, "the endpoint fails")
        assert "does not know the token" in endpoint.failure()
        connection.close()
    endpoint.close()


def test_random_bytes_at_ucx_own_port_harm_nobody(attacked: Attacked) -> None:
    for port in listening_ports():
        for garbage in (b"", b"\x00" * 8, os.urandom(4096), b"GET / HTTP/1.1\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", port), 5.0) as stranger:
                stranger.sendall(garbage)
    attacked.check_serves()


@FUZZ
@given(frame=UCX_FRAMES, num_bytes=st.integers(0, 9000), at=st.integers(0, 60), flip=st.integers(0, 255))
def test_mutated_frames_of_a_known_peer_write_nothing_unexpected(
    attacked: Attacked, frame: Parcel | Notice | Ask, num_bytes: int, at: int, flip: int
) -> None:
    stranger = Stranger(attacked.worker, attacked.description)
    message = bytearray(batch([encode(frame)]))
    message[at % len(message)] ^= flip
    stranger.control(bytes(message))
    stranger.payload(frame.number, num_bytes)
    stranger.close()


@pytest.mark.parametrize(
    "message", [b"\x91" * 100_000, b"\xdc\xff\xff", b"\xdc\x00\x00", b"x" * (MAX_MESSAGE_BYTES + 12_000)]
)
def test_a_message_that_is_no_batch_ends_its_connection_alone(attacked: Attacked, message: bytes) -> None:
    stranger = Stranger(attacked.worker, attacked.description)
    stranger.control(message)
    until(stranger.is_hung_up_on, 5.0, "the receiver hangs up")
    stranger.close()
    attacked.check_serves()


@pytest.mark.parametrize("num_bytes", [2048, 8192])
def test_a_payload_of_another_size_is_refused(attacked: Attacked, num_bytes: int) -> None:
    before, landing = attacked.malformed(), attacked.receiver.expect("sizes", [1])
    stranger = Stranger(attacked.worker, attacked.description)
    stranger.frames(Parcel(0, "sizes", [Part(0, [1], 0, 4096)]))
    stranger.payload(0, num_bytes)
    until(lambda: stranger.is_hung_up_on() or attacked.malformed() > before, 5.0, "it is refused")
    assert landing.num_written() == 0
    landing.close()
    stranger.close()
    attacked.check_serves()


def test_a_flood_of_frames_without_payloads_ends_its_connection(attacked: Attacked) -> None:
    stranger = Stranger(attacked.worker, attacked.description)
    frames = [encode(Parcel(number, "t", [Part(0, [1], 0, 4096)])) for number in range(1000)]
    for first in range(0, 1000, 250):
        stranger.control(batch(frames[first : first + 250]))
    until(stranger.is_hung_up_on, 5.0, "the receiver hangs up")
    stranger.close()
    attacked.check_serves()


def test_after_all_that_the_thread_still_serves(attacked: Attacked) -> None:
    attacked.check_serves()
    assert attacked.malformed() > 0


def listening_ports() -> set[int]:
    """Every port on which this process listens: our doors, and UCX's."""
    links = [os.readlink(each) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    inodes = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:[")}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {int(row[1].partition(":")[2], 16) for row in rows if row[3] == "0A" and row[9] in inodes}
