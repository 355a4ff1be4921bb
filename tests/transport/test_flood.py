"""Strangers that send without an end, all at once, or only connect: what they can make us keep is bounded."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

import transport.control
import transport.doorway
from core.handoff import Peer
from tests.poll import until
from tests.transport.memory import Owned
from tests.transport.test_control import plane
from tests.transport.zmtp import GREETING, ROUTER, flood, old_greeting, part, ready, stranger
from transport.base import TransferState
from transport.conformance_pair import finish
from transport.intake import Intake, IntakeLimits
from transport.messages import MAX_MESSAGE_BYTES, Cancelled, Decline
from transport.zmq_tcp import ZmqTransport
from transport.zmq_wire import Welcome, decode_description, encode

GIGABYTE = 1 << 30
MAX_GROWTH_BYTES = 400 << 20
"""A few limits, and what a fast loopback carries between two looks; without limits it is the whole gigabyte."""


def test_a_message_without_an_end_is_cut_off_and_the_control_plane_serves_on() -> None:
    with plane("a") as (a, _), plane("b") as (b, heard):
        before = _resident_bytes()
        with stranger(_port(b.address), b"PUSH") as attacker:
            assert flood(attacker, GIGABYTE) < GIGABYTE
        assert _resident_bytes() - before < MAX_GROWTH_BYTES
        assert a.send(b.peer, Cancelled("proper"))
        until(lambda: [each.handoff for each in heard.envelopes] == ["proper"], what="a proper message")


def test_a_message_without_an_end_is_cut_off_and_the_data_plane_serves_on() -> None:
    sender, receiver = Owned(ZmqTransport("127.0.0.1"), fill=3), Owned(ZmqTransport("127.0.0.1"))
    landing = receiver.expect("t", [0])
    before = _resident_bytes()
    with stranger(_port(decode_description(receiver.transport.describe()).address), b"DEALER") as attacker:
        assert flood(attacker, GIGABYTE) < GIGABYTE
    assert _resident_bytes() - before < MAX_GROWTH_BYTES
    endpoint = sender.transport.connect(receiver.transport.describe())
    finish(endpoint.write("t", sender.blocks([0]), receiver.blocks([0]), b"."))
    assert landing.poll() == [b"."]
    endpoint.close()
    for owned in (sender, receiver):
        owned.transport.close()


@contextmanager
def flooding_listener(kind: bytes) -> Iterator[int]:
    """Its port: whoever connects is sent a message without an end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(GREETING + ready(kind))
                sent.append(flood(connection, GIGABYTE))

        sent: list[int] = []
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        before = _resident_bytes()
        yield int(listener.getsockname()[1])
        thread.join(20)
        assert sent
        assert sent[0] < GIGABYTE
        assert _resident_bytes() - before < MAX_GROWTH_BYTES


def test_a_listener_that_floods_its_caller_loses_the_control_planes_connection() -> None:
    with plane("a") as (a, heard), flooding_listener(b"PULL") as port:
        peer = Peer("x", f"tcp://127.0.0.1:{port}", "x")
        assert a.send(peer, Cancelled("1"))
        until(lambda: heard.lost == [peer.control], what="the connection is given up")


def test_a_listener_that_floods_its_caller_fails_the_zmq_endpoint() -> None:
    sender = Owned(ZmqTransport("127.0.0.1"), fill=3)
    with flooding_listener(b"ROUTER") as port:
        true = decode_description(sender.transport.describe())
        lie = msgspec.structs.replace(true, address=f"tcp://127.0.0.1:{port}")
        endpoint = sender.transport.connect(encode(lie))
        until(endpoint.failure, what="the endpoint fails")
        endpoint.close()
    sender.transport.close()


def test_a_listener_of_an_older_protocol_is_not_heard() -> None:
    zmq = ZmqTransport("127.0.0.1")
    sender = Owned(zmq, fill=3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        true = decode_description(sender.transport.describe())
        lie = msgspec.structs.replace(true, address=f"tcp://127.0.0.1:{listener.getsockname()[1]}")
        endpoint = sender.transport.connect(encode(lie))
        connection, _ = listener.accept()
        with connection:
            connection.sendall(old_greeting(ROUTER) + part(encode(Welcome()), more=False))
            until(lambda: zmq.malformed == 1, what="its word is dropped")
            transfer = endpoint.write("t", sender.blocks([0]), sender.blocks([0]), b".")
        finish(transfer, state=TransferState.FAILED)
        endpoint.close()
    sender.transport.close()


def test_many_small_messages_are_never_mistaken_for_one_without_an_end() -> None:
    with plane("a") as (a, lost), plane("b") as (b, heard):
        num_bytes, count = 0, 0
        while num_bytes < transport.control.LIMITS.connection_bytes * 2:
            message = Decline(str(count), "x" * 3000)
            until(lambda message=message: a.send(b.peer, message), what="room")  # type: ignore[misc]
            num_bytes, count = num_bytes + 3000, count + 1
        until(lambda: len(heard.envelopes) == count, what="all messages")
        assert lost.lost == []


def test_large_messages_that_nobody_takes_are_bounded_over_all_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole messages count as well: while a callback is late, many strangers may send large ones."""
    monkeypatch.setattr(
        transport.control, "LIMITS", IntakeLimits(4 * MAX_MESSAGE_BYTES, total_bytes=32 << 20, max_connections=64)
    )
    with plane("b") as (b, _):
        before = _resident_bytes()
        attackers = [stranger(_port(b.address), b"PUSH") for _ in range(40)]
        message = part(b"z" * (1 << 20), more=True) + part(b"z" * (1 << 20), more=True)

        def send(attacker: socket.socket) -> None:
            attacker.settimeout(2)
            try:
                for _ in range(6):
                    attacker.sendall(message)
            except OSError:
                return

        threads = [threading.Thread(target=send, args=(attacker,)) for attacker in attackers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert _resident_bytes() - before < MAX_GROWTH_BYTES, "480 MB were sent"
        for attacker in attackers:
            attacker.close()


def test_strangers_that_only_connect_keep_nobody_out_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport.doorway, "HANDSHAKE_TIMEOUT_MS", 300)
    monkeypatch.setattr(transport.control, "LIMITS", IntakeLimits(1 << 20, 1 << 20, max_connections=16))
    with plane("a") as (a, _), plane("b") as (b, heard):
        before = len(os.listdir("/proc/self/fd"))
        silent = [socket.create_connection(("127.0.0.1", _port(b.address)), 5) for _ in range(60)]
        until(lambda: len(os.listdir("/proc/self/fd")) <= before + 60 + 16, what="those too many are shut out")

        def is_heard() -> bool:
            a.send(b.peer, Cancelled("proper"))
            return bool(heard.envelopes)

        until(is_heard, 5.0, "a proper peer comes in")
        for connection in silent:
            connection.close()
        until(lambda: len(os.listdir("/proc/self/fd")) <= before + 8, what="nothing stays")


@pytest.fixture
def connected() -> Iterator[Callable[[], tuple[socket.socket, socket.socket]]]:
    """Makes TCP connections to one listener: the stranger's end, and ours."""
    ends: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def make() -> tuple[socket.socket, socket.socket]:
            far = socket.create_connection(listener.getsockname())
            near, _ = listener.accept()
            ends.extend((far, near))
            return far, near

        yield make
    for end in ends:
        end.close()


def test_the_intake_cuts_who_is_too_far_ahead_and_nobody_else(connected: Any) -> None:
    (quick, near_quick), (slow, near_slow) = connected(), connected()
    intake = Intake(near_quick.getsockname()[1], IntakeLimits(10_000, 1_000_000))
    for near in (near_quick, near_slow):
        intake.opened(near.fileno())
    for _ in range(10):  # takes what comes: never too far ahead
        slow.sendall(b"x" * 5000)
        until(lambda: len(near_slow.recv(5000)) > 0)
        intake.took_from(near_slow.fileno(), 5000, 1)
        assert intake.check() == 0
    quick.sendall(b"x" * 10_001)
    until(lambda: intake.check() == 1, what="it is cut")
    assert len(intake) == 1
    assert quick.recv(1) == b"", "its connection is shut"
    slow.sendall(b"still open")
    assert near_slow.recv(100)


def test_a_descriptor_that_is_no_connection_by_now_is_left_alone(tmp_path: Path) -> None:
    intake = Intake(1, IntakeLimits(10_000, 1_000_000))
    with (tmp_path / "file").open("wb") as file:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(10):
            intake.opened(file.fileno())
            intake.check()
        assert len(os.listdir("/proc/self/fd")) == before
        assert len(intake) == 0
        file.write(b"still open")


def test_the_intake_bounds_all_together_and_the_number_of_connections(connected: Any) -> None:
    pairs = [connected() for _ in range(4)]
    intake = Intake(pairs[0][1].getsockname()[1], IntakeLimits(10_000, 12_000, max_connections=3))
    for _, near in pairs:
        intake.opened(near.fileno())
    assert (len(intake), intake.num_cut) == (3, 1)
    assert pairs[3][0].recv(1) == b""
    for far, size in zip((pair[0] for pair in pairs[:3]), (9000, 6000, 1000), strict=True):
        far.sendall(b"x" * size)
    until(lambda: intake.check() == 1, what="the largest is cut")
    assert intake.check() == 0
    assert pairs[0][0].recv(1) == b""


def test_a_descriptor_that_is_somebody_elses_by_now_is_left_alone(connected: Any) -> None:
    (far, near), (other_far, other_near) = connected(), connected()
    intake = Intake(near.getsockname()[1], IntakeLimits(100, 100))
    intake.opened(near.fileno())
    os.dup2(other_near.fileno(), near.fileno())
    other_far.sendall(b"x" * 5000)
    far.close()
    assert intake.check() == 0
    assert len(intake) == 0
    assert len(other_near.recv(5000)) > 0
    unrelated = Intake(1, IntakeLimits(100, 100))
    unrelated.opened(other_near.fileno())
    unrelated.opened(99_999)
    assert len(unrelated) == 0, "neither a connection of another port nor no connection at all"


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
