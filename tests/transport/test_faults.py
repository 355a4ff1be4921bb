"""What networks and peers do to a connection: each ends within its deadline, and nothing lands behind the fence."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

import transport.outbox
import transport.owner_socket
from core.errors import TransferError
from core.handoff import Peer
from tests.poll import until
from tests.transport.memory import Owned
from tests.transport.relay import Relay
from tests.transport.test_control import plane
from tests.transport.test_zmq import HastyClock, make_hasty
from transport.base import Blocks, Endpoint, TransferState
from transport.conformance_pair import finish
from transport.messages import Cancelled
from transport.schemes import make_transport
from transport.shm import ShmTransport
from transport.shm_wire import decode_description as decode_shm
from transport.shm_wire import encode_description
from transport.zmq_tcp import ZmqTransport
from transport.zmq_wire import ZmqDescription, decode_description, encode

LARGE = 1 << 20


class Detour:
    """A sender and a receiver over zmq, with a relay between them."""

    def __init__(self) -> None:
        self.sender = Owned(make_hasty(), LARGE, 32, fill=5)
        self.receiver = Owned(make_hasty(), LARGE, 32)
        self.description = decode_description(self.receiver.transport.describe())
        self.relay = Relay(int(self.description.address.rpartition(":")[2]))

    def connect(self) -> Endpoint:
        return self.sender.transport.connect(encode(self.through_relay()))

    def through_relay(self) -> ZmqDescription:
        return msgspec.structs.replace(self.description, address=self.relay.address)


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """PyZMQ starts a thread of its own at the first large message, and keeps it."""
    sender, receiver = Owned(ZmqTransport("127.0.0.1"), LARGE, 1), Owned(ZmqTransport("127.0.0.1"), LARGE, 1)
    receiver.expect("t", [0])
    endpoint = sender.transport.connect(receiver.transport.describe())
    finish(endpoint.write("t", sender.blocks([0]), receiver.blocks([0])))
    endpoint.close()
    for owned in (sender, receiver):
        owned.transport.close()


@pytest.fixture
def detour() -> Iterator[Detour]:
    before = _traces()
    detour = Detour()
    yield detour
    detour.relay.close()
    for owned in (detour.sender, detour.receiver):
        owned.transport.close()
    until(lambda: _traces() <= before, what="nothing stays")


def test_a_connection_that_carries_nothing_any_more_is_given_up_and_what_comes_late_lands_nowhere(
    detour: Detour,
) -> None:
    sender, receiver = detour.sender, detour.receiver
    endpoint = detour.connect()
    landing = receiver.expect("t", range(32))
    finish(endpoint.write("t", sender.blocks([0]), receiver.blocks([0])))
    detour.relay.is_forwarding.clear()
    running = endpoint.write("t", sender.blocks(range(1, 32)), receiver.blocks(range(1, 32)), b"end")
    cancelled = endpoint.write("t", sender.blocks([1]), receiver.blocks([1]))
    cancelled.cancel()
    until(endpoint.failure, 5.0, "the endpoint is given up")  # the hasty clock makes ten seconds of one and a quarter
    assert "has answered nothing for 10 s" in endpoint.failure()
    assert running.poll() is TransferState.FAILED
    assert cancelled.poll() is TransferState.FAILED
    assert landing.close() is True
    for block_id in range(32):
        receiver.put(block_id, b"\xee" * LARGE)
    detour.relay.is_forwarding.set()
    again = detour.connect()
    receiver.expect("u", [0])
    finish(again.write("u", sender.blocks([0]), receiver.blocks([0])))
    until(lambda: len(detour.relay.seen) > LARGE, what="the late bytes have gone by")
    assert all(receiver.block(block_id) == b"\xee" * LARGE for block_id in range(1, 32))
    for each in (endpoint, again):
        each.close()


def test_a_peer_that_restarted_under_the_same_address_does_not_listen_to_what_was_meant_for_the_old_one(
    detour: Detour,
) -> None:
    sender, old = detour.sender, detour.receiver
    endpoint = detour.connect()
    old.expect("t", [0])
    finish(endpoint.write("t", sender.blocks([0]), old.blocks([0])))
    old.transport.close()
    new = Owned(make_hasty(), LARGE, 32)
    new.expect("t", [0])
    detour.relay.target_port = int(decode_description(new.transport.describe()).address.rpartition(":")[2])
    until(endpoint.failure, 2.0, "the old connection has ended")
    stale = detour.connect()
    transfer = stale.write("t", sender.blocks([0]), new.blocks([0]))
    until(stale.failure, 5.0, "the deadline of connecting")
    assert transfer.poll() is TransferState.FAILED
    assert new.transport.malformed >= 1  # type: ignore[attr-defined]
    assert new.block(0) == bytes(LARGE)
    detour.description = decode_description(new.transport.describe())
    fresh = detour.connect()
    finish(fresh.write("t", sender.blocks([0]), new.blocks([0])))
    assert new.block(0) == sender.block(0)
    for each in (endpoint, stale, fresh):
        each.close()
    new.transport.close()


@contextlib.contextmanager
def silent_listener() -> Iterator[int]:
    """Accepts and says nothing; its port."""
    accepted: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    accepted.append(listener.accept()[0])

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield int(listener.getsockname()[1])
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)
    for connection in accepted:
        connection.close()


def test_a_zmq_listener_that_accepts_and_says_nothing() -> None:
    before = _traces()
    sender = Owned(ZmqTransport("127.0.0.1", HastyClock()))
    with silent_listener() as port:
        true = decode_description(sender.transport.describe())
        endpoint = sender.transport.connect(encode(msgspec.structs.replace(true, address=f"tcp://127.0.0.1:{port}")))
        transfer = endpoint.write("t", sender.blocks([0]), sender.blocks([0]))
        until(endpoint.failure, 5.0, "the deadline of connecting")
        assert transfer.poll() is TransferState.FAILED
        endpoint.close()
    sender.transport.close()
    until(lambda: _traces() <= before, what="nothing stays")


def test_a_control_listener_that_accepts_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport.outbox, "HANDSHAKE_TIMEOUT_MS", 300)
    before = _traces()
    with plane("a") as (a, heard), silent_listener() as port:
        peer = Peer("x", f"tcp://127.0.0.1:{port}", "x")
        assert a.send(peer, Cancelled("1"))
        until(lambda: heard.lost == [peer.control], 5.0, "the peer is given up")
    until(lambda: _traces() <= before, what="nothing stays")


def test_an_shm_owner_that_accepts_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport.owner_socket, "_TIMEVAL", struct.pack("ll", 0, 300_000))
    sender = Owned(ShmTransport())
    true = decode_shm(sender.transport.describe())
    before = _traces()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as mute:
        mute.bind(f"\0baton-mute-{os.getpid()}")
        mute.listen(4)
        lie = msgspec.structs.replace(true, socket=f"baton-mute-{os.getpid()}")
        endpoint = sender.transport.connect(encode_description(lie))
        transfer = endpoint.write("t", sender.blocks([0]), sender.blocks([0]))
        until(endpoint.failure, 3.0, "the deadline of connecting")
        assert transfer.poll() is TransferState.FAILED
        endpoint.close()
    until(lambda: _traces() <= before, what="nothing stays")
    sender.transport.close()


@pytest.mark.parametrize("scheme", ["shm", "zmq", "inproc"])
def test_the_description_of_another_model_fits_no_write(scheme: str) -> None:
    """The layouts' fingerprints keep such a pair apart long before; the transport does not rely on it."""
    sender, other = (Owned(make_transport(scheme, "127.0.0.1"), size, 8, fill=1) for size in (4096, 2048))
    other.expect("t", range(8))
    endpoint = sender.transport.connect(other.transport.describe())
    for local, remote, why in (
        (sender.blocks([0]), other.blocks([0]), "differ"),
        (sender.blocks([0]), Blocks(7, (0,)), "region 7 is not known"),
        (Blocks(0, (0,), 0, 2048), Blocks(0, (9,)), "outside remote region"),
        (Blocks(0, (0,), 0, 2048), Blocks(0, (0,), 1024, 2048), "lie outside remote region"),
    ):
        with pytest.raises(TransferError, match=why):
            endpoint.write("t", local, remote)
    assert all(other.block(block_id) == b"\x01" * 2048 for block_id in range(8))
    endpoint.close()
    for owned in (sender, other):
        owned.transport.close()


def _traces() -> int:
    mappings = Path("/proc/self/maps").read_text().count("baton-kv")
    return len(os.listdir("/proc/self/fd")) + threading.active_count() + mappings
