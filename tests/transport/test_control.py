"""The control plane: words arrive, garbage is counted, a peer's death is told, nothing waits."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import transport.outbox
from core.errors import ConfigError, ProtocolError
from core.handoff import Peer
from tests.poll import until
from tests.transport.peer_process import PeerProcess, peer_at
from transport.control import Callbacks, ControlPlane, Identity
from transport.messages import Cancelled, Decline, Envelope, decode_body, encode


class Heard:
    """What one plane's callbacks were told."""

    def __init__(self) -> None:
        self.envelopes: list[Envelope] = []
        self.lost: list[str] = []
        self.ticks = 0

    def tick(self) -> None:
        self.ticks += 1

    def callbacks(self) -> Callbacks:
        return Callbacks(self.envelopes.append, self.lost.append, self.tick)


@contextmanager
def plane(name: str) -> Iterator[tuple[ControlPlane, Heard]]:
    heard = Heard()
    control = ControlPlane("127.0.0.1", Identity(name, f"boot-{name}", "print"), heard.callbacks())
    try:
        yield control, heard
    finally:
        control.close()


def test_messages_arrive_in_order_with_their_sender() -> None:
    with plane("a") as (a, _), plane("b") as (b, heard):
        assert all(a.send(b.peer, Cancelled(str(i))) for i in range(100))
        until(lambda: len(heard.envelopes) == 100, what="all messages")
        assert [decode_body(envelope).handoff for envelope in heard.envelopes] == [str(i) for i in range(100)]
        assert heard.envelopes[0].sender == a.peer
        assert heard.envelopes[0].fingerprint == "print"
        assert (b.malformed, a.unsent) == (0, 0)


def test_many_threads_may_send_at_once() -> None:
    with plane("a") as (a, _), plane("b") as (b, heard):

        def send_some() -> None:
            for i in range(50):
                a.send(b.peer, Cancelled(str(i)))

        threads = [threading.Thread(target=send_some) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        until(lambda: len(heard.envelopes) == 200, what="all messages")


def test_it_ticks() -> None:
    with plane("a") as (_, heard):
        until(lambda: heard.ticks >= 3, 2.0, "three ticks")


def test_a_callback_that_raises_does_not_end_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []

    def on_envelope(envelope: Envelope) -> None:
        seen.append(envelope.handoff)
        raise ValueError(envelope.handoff)

    b = ControlPlane("127.0.0.1", Identity("b", "boot", "print"), Callbacks(on_envelope))
    with plane("a") as (a, _):
        for handoff in ("1", "2"):
            a.send(b.peer, Decline(handoff, ""))
        until(lambda: seen == ["1", "2"], what="both messages")
    b.close()
    assert "a callback failed" in caplog.text


@pytest.mark.parametrize(
    "address", ["", "tcp://*:1", "ipc:///tmp/x", "tcp://h:1;h:2", "tcp://h:0", "tcp://h", "tcp://h:1 "]
)
def test_an_address_of_another_form_is_a_protocol_error(address: str) -> None:
    with plane("a") as (a, _), pytest.raises(ProtocolError):
        a.send(Peer("x", address, "boot"), Cancelled("1"))


def test_a_killed_peer_is_reported_lost_once() -> None:
    with plane("a") as (a, heard), PeerProcess("control") as process:
        peer = peer_at(process.says())
        assert a.send(peer, Cancelled("hello"))
        assert process.says() == "hello"
        process.signal(signal.SIGKILL)
        until(lambda: heard.lost, 1.0, "the loss is told")
        assert heard.lost == [peer.control]


def test_a_peer_that_was_never_there_is_reported_lost() -> None:
    with plane("a") as (a, heard):
        with plane("b") as (b, _):
            address = b.address
        assert a.send(peer_at(address), Cancelled("1"))
        until(lambda: heard.lost == [address], 1.0, "the loss is told")


def test_a_full_queue_refuses_instead_of_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport.outbox, "MAX_QUEUED_MESSAGES", 5)
    with socket.create_server(("127.0.0.1", 0)) as mute, plane("a") as (a, _):
        peer = peer_at(f"tcp://127.0.0.1:{mute.getsockname()[1]}")
        sent = [a.send(peer, Cancelled(str(i))) for i in range(20)]
        assert sent[0]
        assert not sent[-1]
        assert a.unsent == sent.count(False)


def test_sockets_are_bounded_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport.outbox, "MAX_PEERS", 3)
    with plane("a") as (a, _), socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        for i in range(1, 9):
            a.send(peer_at(f"tcp://127.0.0.{i}:{port}"), Cancelled("1"))
        assert len(a._peers) <= 3
        a.forget(peer_at(f"tcp://127.0.0.8:{port}"))
        assert f"tcp://127.0.0.8:{port}" not in a._peers


def test_after_close_nothing_is_sent_and_nothing_stays_open() -> None:
    with plane("warm") as (a, _):
        a.send(a.peer, Cancelled("1"))
    before = len(os.listdir("/proc/self/fd")) + threading.active_count()
    for _ in range(10):
        with plane("a") as (a, heard), plane("b") as (b, _):
            b.send(a.peer, Cancelled("1"))
            until(lambda heard=heard: heard.envelopes, what="the message")  # type: ignore[misc]
    assert not a.send(b.peer, Cancelled("1"))
    a.close()
    until(lambda: len(os.listdir("/proc/self/fd")) + threading.active_count() <= before, what="nothing stays open")


def test_a_host_that_is_not_ours_is_a_config_error() -> None:
    for host in ("0.0.0.0", "203.0.113.7"):
        with pytest.raises(ConfigError):
            ControlPlane(host, Identity("a", "boot", "print"), Heard().callbacks())


class Attacked:
    """A plane, and a raw socket to it."""

    def __init__(self) -> None:
        self.heard = Heard()
        self.plane = ControlPlane("127.0.0.1", Identity("a", "boot", "print"), self.heard.callbacks())
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.push = self._context.socket(zmq.PUSH)
        self.push.setsockopt(zmq.LINGER, 0)
        self.push.connect(self.plane.address)

    def check_serves(self) -> None:
        before = len(self.heard.envelopes)
        self.push.send(encode(Cancelled("proper"), self.plane.peer, "print"))
        until(lambda: any(e.handoff == "proper" for e in self.heard.envelopes[before:]), what="a proper message")

    def close(self) -> None:
        self._context.destroy(0)
        self.plane.close()


@pytest.fixture(scope="module")
def attacked() -> Iterator[Attacked]:
    attacked = Attacked()
    yield attacked
    attacked.check_serves()
    attacked.close()


FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PROPER = encode(Decline("1", "why"), Peer("x", "tcp://h:1", "boot"), "print")


@FUZZ
@given(parts=st.lists(st.binary(max_size=100), min_size=1, max_size=4))
def test_random_bytes_are_counted_and_dropped(attacked: Attacked, parts: list[bytes]) -> None:
    attacked.push.send_multipart(parts)


@FUZZ
@given(at=st.integers(0, len(PROPER) - 1), byte=st.integers(0, 255), end=st.integers(0, len(PROPER)))
def test_mutated_messages_do_not_end_the_thread(attacked: Attacked, at: int, byte: int, end: int) -> None:
    mutated = bytearray(PROPER)
    mutated[at] = byte
    attacked.push.send(bytes(mutated[:end]))


def test_nesting_several_parts_and_size_are_bounded(attacked: Attacked) -> None:
    before = attacked.plane.malformed
    attacked.push.send(PROPER[: PROPER.index(b"print") + 5] + b"\xa11" + b"\x91" * 200_000)
    attacked.push.send_multipart([PROPER, PROPER])
    until(lambda: attacked.plane.malformed >= before + 2, what="both are counted")
    attacked.check_serves()
