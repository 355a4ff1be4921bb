"""With keys only their holders get in, nothing can be read on the way, and a mismatch is said by both sides."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from core.errors import ConfigError
from core.handoff import Peer
from tests.poll import until
from tests.transport.memory import Owned
from tests.transport.relay import Relay
from tests.transport.test_control import Heard
from transport.base import TransferState
from transport.conformance import check_transport
from transport.conformance_pair import finish
from transport.control import ControlPlane, Identity
from transport.curve import secure_caller
from transport.faulty import Faults, FaultyTransport
from transport.keys import Keys, make_keys, read_keys
from transport.messages import Accept, Cancelled, encode
from transport.schemes import make_transport, unavailable
from transport.zmq_tcp import ZmqTransport
from transport.zmq_wire import Hello, decode_description
from transport.zmq_wire import encode as encode_frame

SECRET = os.urandom(64)
NOT_WE = "it is not encrypted and this process is"
NOT_THEY = "it is encrypted and this process is not"
OTHERS = "it has other keys than this process"
HUNG_UP = "it hung up in the handshake"
REMEDIES = ("give both the same --keys", "give both the same --keys, or neither")


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    make_keys(tmp_path / "keys")
    return read_keys(tmp_path / "keys")


@pytest.fixture
def other_keys(tmp_path: Path) -> Keys:
    make_keys(tmp_path / "other")
    return read_keys(tmp_path / "other")


Plane = Callable[[str, Keys | None], tuple[ControlPlane, Heard]]


@pytest.fixture
def plane() -> Iterator[Plane]:
    planes: list[ControlPlane] = []

    def make(name: str, keys: Keys | None) -> tuple[ControlPlane, Heard]:
        heard = Heard()
        planes.append(ControlPlane("127.0.0.1", Identity(name, name, "print"), heard.callbacks(), keys=keys))
        return planes[-1], heard

    yield make
    for each in planes:
        each.close()


def test_zmq_with_keys_does_what_every_transport_must(keys: Keys) -> None:
    check_transport(lambda: FaultyTransport(ZmqTransport("127.0.0.1", keys=keys), Faults()))


def test_the_control_plane_speaks_between_holders_of_the_keys(keys: Keys, plane: Plane) -> None:
    (a, _), (b, heard) = plane("a", keys), plane("b", keys)
    assert all(a.send(b.peer, Cancelled(str(number))) for number in range(100))
    until(lambda: len(heard.envelopes) == 100, what="all messages")
    assert [envelope.handoff for envelope in heard.envelopes] == [str(number) for number in range(100)]


@pytest.mark.parametrize("is_encrypted", [False, True])
def test_what_goes_by_shows_neither_words_nor_blocks_only_with_keys(
    keys: Keys, plane: Plane, is_encrypted: bool
) -> None:
    used = keys if is_encrypted else None
    (a, _), (b, heard) = plane("a", used), plane("b", used)
    sender, receiver = (Owned(ZmqTransport("127.0.0.1", keys=used)) for _ in range(2))
    description = decode_description(receiver.transport.describe())
    relays = [Relay(int(address.rpartition(":")[2])) for address in (b.address, description.address)]
    accept = Accept(
        handoff="hand-off-1",
        num_prompt_tokens=3,
        prompt_hash=SECRET,
        first_block=0,
        block_ids=[70_001, 70_002, 70_003, 70_004],
        num_tokens=2,
        schemes=[],
        full_digest=True,
        timeout_s=1.0,
    )
    assert a.send(msgspec.structs.replace(b.peer, control=relays[0].address), accept)
    until(lambda: heard.envelopes, what="the message through the relay")
    block = (SECRET * 64)[:4096]
    sender.put(0, block)
    landing = receiver.expect("tag-of-mine", [3])
    detour = msgspec.structs.replace(description, address=relays[1].address)
    endpoint = sender.transport.connect(encode_frame(detour))
    finish(endpoint.write("tag-of-mine", sender.blocks([0]), receiver.blocks([3]), b"."))
    assert landing.poll() == [b"."]
    assert receiver.block(3) == block
    endpoint.close()
    seen = b"".join(bytes(relay.seen) for relay in relays)
    assert len(seen) > 4096
    ids = b"".join(msgspec.msgpack.encode(number) for number in accept.block_ids)
    needles = [SECRET[:16], b"hand-off-1", b"tag-of-mine", ids, description.token.encode(), b"print"]
    assert [needle in seen for needle in needles] == [not is_encrypted] * len(needles)
    for relay in relays:
        relay.close()
    for owned in (sender, receiver):
        owned.transport.close()


def test_a_mismatch_is_said_by_both_sides_of_the_control_plane(
    keys: Keys, other_keys: Keys, plane: Plane, caplog: pytest.LogCaptureFixture
) -> None:
    for ours, theirs, causes in (
        (keys, None, (NOT_WE, NOT_THEY)),
        (None, keys, (NOT_THEY, NOT_WE)),
        (keys, other_keys, (OTHERS, OTHERS)),
    ):
        caplog.clear()
        (a, told), (b, heard) = plane("a", ours), plane("b", theirs)
        begun_s = time.monotonic()
        assert a.send(b.peer, Cancelled("1"))
        until(lambda told=told: told.lost, what="the caller is told")  # type: ignore[misc]
        until(lambda: len(_warnings(caplog)) == 2, what="both sides say so")
        assert time.monotonic() - begun_s < 10, "the connect deadline"
        by_caller, by_listener = sorted(_warnings(caplog), key=lambda text: "refused a caller" in text)
        assert f"cannot speak to {b.address}" in by_caller
        assert by_caller.endswith(REMEDIES)
        assert by_listener.endswith(REMEDIES)
        named = [cause in said for cause, said in zip(causes, (by_caller, by_listener), strict=True)]
        hung_up = [HUNG_UP in said for said in (by_caller, by_listener)]
        assert named in ([True, True], [not each for each in hung_up]), "one may only see that the other hung up"
        assert any(named)
        assert by_listener.startswith(f"{b.address} refused a caller")
        assert heard.envelopes == []
        assert b.malformed == 0


def test_a_mismatch_ends_a_zmq_endpoint_with_the_cause(
    keys: Keys, other_keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    for ours, theirs, why in ((keys, None, NOT_WE), (None, keys, NOT_THEY), (keys, other_keys, OTHERS)):
        caplog.clear()
        sender, receiver = (Owned(ZmqTransport("127.0.0.1", keys=used), fill=1) for used in (ours, theirs))
        endpoint = sender.transport.connect(receiver.transport.describe())
        transfer = endpoint.write("t", sender.blocks([0]), receiver.blocks([0]))
        until(endpoint.failure, 5.0, "the endpoint fails")
        assert why in endpoint.failure() or HUNG_UP in endpoint.failure()
        assert endpoint.failure().endswith(REMEDIES)
        assert transfer.poll() is TransferState.FAILED
        until(lambda: _warnings(caplog), what="the listener says so")
        assert "refused a caller" in _warnings(caplog)[0]
        endpoint.close()
        for owned in (sender, receiver):
            owned.transport.close()


def test_the_listeners_public_key_alone_does_not_let_anybody_in(keys: Keys, other_keys: Keys, plane: Plane) -> None:
    """The caller's key is asked for as well: a stranger that has seen one half of one pair is no member."""
    half = Keys(keys.listener, other_keys.caller)
    receiver = Owned(ZmqTransport("127.0.0.1", keys=keys))
    description = decode_description(receiver.transport.describe())
    b, heard = plane("b", keys)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    for kind, address, message in (
        (zmq.DEALER, description.address, encode_frame(Hello(description.token))),
        (zmq.PUSH, b.address, encode(Cancelled("1"), Peer("x", "tcp://h:1", "x"), "print")),
    ):
        stranger = context.socket(kind)
        stranger.setsockopt(zmq.LINGER, 0)
        secure_caller(stranger, half)
        monitor = stranger.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
        stranger.connect(address)
        stranger.send(message)
        assert monitor.poll(5000), "it is refused by name"
        stranger.disable_monitor()
        monitor.close(0)
        stranger.close(0)
    context.destroy(0)
    assert heard.envelopes == []
    assert b.malformed == 0
    receiver.transport.close()


def test_shm_stays_as_it_is_and_what_cannot_be_encrypted_is_refused(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_transport("shm", "127.0.0.1", keys).close()
    make_transport("zmq", "127.0.0.1", keys).close()
    monkeypatch.setattr("transport.schemes._MODULES", {"plain": "transport.inproc"})
    assert unavailable("plain") == ""
    with pytest.raises(ConfigError, match="cannot be encrypted, and the cluster has keys: use zmq or shm"):
        make_transport("plain", "127.0.0.1", keys)


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
