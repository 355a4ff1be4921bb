"""Hostile bytes at the ZMQ sockets, below the messages: dropped, never written anywhere; service goes on."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.handoff import Peer
from tests.poll import until
from tests.transport.fuzzing import FUZZ, MUTATIONS, mutated
from tests.transport.memory import Owned
from tests.transport.test_control import Heard
from tests.transport.zmtp import DEALER, GREETING, PUSH, old_greeting, part, ready
from transport.conformance_pair import finish
from transport.control import ControlPlane, Identity
from transport.keys import Keys, make_keys, read_keys
from transport.messages import Cancelled, encode
from transport.zmq_tcp import ZmqTransport
from transport.zmq_wire import Data, Hello
from transport.zmq_wire import decode_description as decode_zmq
from transport.zmq_wire import encode as encode_frame


class Sockets:
    """A control plane and a zmq receiver, and the bytes that a proper caller would send to each."""

    def __init__(self, keys: Keys | None) -> None:
        self.keys = keys
        self.heard = Heard()
        self.plane = ControlPlane("127.0.0.1", Identity("b", "b", "print"), self.heard.callbacks(), keys=keys)
        self.caller = ControlPlane("127.0.0.1", Identity("a", "a", "print"), Heard().callbacks(), keys=keys)
        self.receiver = Owned(ZmqTransport("127.0.0.1", keys=keys), fill=0)
        self.sender = Owned(ZmqTransport("127.0.0.1", keys=keys), fill=9)
        self.landing = self.receiver.expect("open", [1])
        description = decode_zmq(self.receiver.transport.describe())
        self.ports = [int(each.rpartition(":")[2]) for each in (self.plane.address, description.address)]
        word = encode(Cancelled("1"), Peer("x", "tcp://h:1", "x"), "print")
        data = encode_frame(Data(0, "open", 0, [1], 0, 4096))
        hello = part(encode_frame(Hello(description.token)), more=False)
        told = [part(word, more=False), hello + part(data, more=True) + part(b"\x07" * 4096, more=False)]
        self.proper = [GREETING + ready(kind) + each for kind, each in zip((b"PUSH", b"DEALER"), told, strict=True)]
        self.old = [old_greeting(kind) + each for kind, each in zip((PUSH, DEALER), told, strict=True)]

    def send(self, which: int, content: bytes) -> None:
        address = ("127.0.0.1", self.ports[which])
        with contextlib.suppress(OSError), socket.create_connection(address, 5) as connection:
            connection.sendall(content)

    def check_serve(self) -> None:
        before = len(self.heard.envelopes)
        assert self.caller.send(self.plane.peer, Cancelled("proper"))
        until(lambda: any(each.handoff == "proper" for each in self.heard.envelopes[before:]), what="a message")
        landing = self.receiver.expect("proper", [2])
        endpoint = self.sender.transport.connect(self.receiver.transport.describe())
        finish(endpoint.write("proper", self.sender.blocks([2]), self.receiver.blocks([2]), b"."))
        assert landing.poll() == [b"."]
        landing.close()
        endpoint.close()
        assert self.receiver.block(2) == b"\x09" * 4096
        assert all(self.receiver.block(i) == bytes(4096) for i in (0, 3, 4, 5, 6, 7))
        if self.keys is not None:
            assert self.receiver.block(1) == bytes(4096), "without keys nobody writes, not even what is expected"
            assert self.plane.malformed == 0

    def close(self) -> None:
        for plane in (self.plane, self.caller):
            plane.close()
        for owned in (self.receiver, self.sender):
            owned.transport.close()


@pytest.fixture(scope="module", params=["clear", "keys"])
def sockets(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sockets]:
    keys = None
    if request.param == "keys":
        path = tmp_path_factory.mktemp("keys") / "keys"
        make_keys(path)
        keys = read_keys(path)
    sockets = Sockets(keys)
    before = _traces()
    yield sockets
    sockets.check_serve()
    until(lambda: _traces() <= before + 8, what="every connection is gone")
    sockets.close()


@FUZZ
@given(which=st.integers(0, 1), content=st.binary(max_size=400))
def test_random_bytes_at_the_sockets(sockets: Sockets, which: int, content: bytes) -> None:
    sockets.send(which, content)


@pytest.mark.parametrize("protocol", ["ours", "older"])
@FUZZ
@given(which=st.integers(0, 1), changes=MUTATIONS, end=st.integers(0, 1 << 16))
def test_a_proper_conversation_with_some_bytes_changed(
    sockets: Sockets, protocol: str, which: int, changes: list[tuple[int, int]], end: int
) -> None:
    told = sockets.proper if protocol == "ours" else sockets.old
    sockets.send(which, mutated(told[which], changes, end))


def test_who_speaks_an_older_protocol_is_not_heard(sockets: Sockets) -> None:
    """Of those libzmq does not say over which connection they came, so nobody could be held to account."""
    heard = len(sockets.heard.envelopes)
    for which, content in enumerate(sockets.old):
        sockets.send(which, content)
    sockets.check_serve()
    assert len(sockets.heard.envelopes) == heard + 1, "only the proper one"
    assert sockets.receiver.block(1) == bytes(4096)


def test_parts_that_claim_to_be_huge_and_commands_that_claim_nonsense(sockets: Sockets) -> None:
    huge = b"\x02" + (1 << 62).to_bytes(8, "big")
    long_command = b"\x06" + (1 << 40).to_bytes(8, "big") + b"\x05READY"
    for which, kind in enumerate((b"PUSH", b"DEALER")):
        for tail in (ready(kind) + huge, long_command, ready(kind) + long_command, ready(b"SUB"), ready(kind) * 3):
            sockets.send(which, GREETING + tail)
    sockets.check_serve()


def _traces() -> int:
    return len(os.listdir("/proc/self/fd")) + threading.active_count()
