"""Control messages: what goes in comes out; anything else is a ProtocolError."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ProtocolError
from core.handoff import LONGEST_NAME, Peer
from core.layout import PROTOCOL_VERSION, KVLayout
from transport.messages import (
    Accept,
    Cancel,
    Cancelled,
    Decline,
    Failed,
    Landed,
    Message,
    Part,
    Refused,
    decode_body,
    decode_envelope,
    encode,
)

SENDER = Peer("d0", "tcp://127.0.0.1:4000", "boot")
LAYOUT = KVLayout("model", "bfloat16", 28, 8, 128, 16, 65536, "LBHNC", "amx")
MESSAGES: list[Message] = [
    Accept("h", 100, b"hash", 2, [5, 6, 7], 48, [[("shm", b"x"), ("zmq", b"y")], []], True, 30.0, 2),
    Decline("h", "cached"),
    Cancel("h", "client gone"),
    Cancelled("h"),
    Refused("h", "layout", LAYOUT),
    Failed("h", "deadline"),
    Landed("h", 48, 1 << 40, [Part(0, 0, 84, (1 << 64) - 1, "shm"), Part(1, 0, 84, 1, "zmq")], 1.5, 2.5),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_what_goes_in_comes_out(message: Message) -> None:
    envelope = decode_envelope(encode(message, SENDER, "print"))
    assert (envelope.protocol, envelope.fingerprint, envelope.sender) == (PROTOCOL_VERSION, "print", SENDER)
    assert decode_body(envelope) == message


def test_the_envelope_is_read_even_if_the_body_is_of_another_protocol() -> None:
    envelope = decode_envelope(encode(Cancelled("h"), SENDER, "print"))
    foreign = msgspec.structs.replace(
        envelope, protocol=99, body=msgspec.Raw(msgspec.msgpack.encode({"type": "Newer"}))
    )
    read = decode_envelope(msgspec.msgpack.encode(foreign))
    assert read.protocol == 99
    with pytest.raises(ProtocolError):
        decode_body(read)


def test_envelope_and_body_must_name_the_same_hand_off() -> None:
    envelope = decode_envelope(encode(Cancelled("h"), SENDER, "print"))
    with pytest.raises(ProtocolError, match="other hand-offs"):
        decode_body(msgspec.structs.replace(envelope, handoff="another"))


@pytest.mark.parametrize("field", ["name", "control", "boot_id"])
def test_names_that_a_peer_would_have_to_keep_are_bounded(field: str) -> None:
    longest = msgspec.structs.replace(SENDER, **{field: "x" * LONGEST_NAME})
    decode_body(decode_envelope(encode(Cancelled("h" * LONGEST_NAME), longest, "print")))
    for handoff, sender in (
        ("h" * (LONGEST_NAME + 1), SENDER),
        ("h", msgspec.structs.replace(longest, **{field: "x" * 5000})),
    ):
        with pytest.raises(ProtocolError):
            decode_body(decode_envelope(encode(Cancelled(handoff), sender, "print")))


@given(wire=st.binary(max_size=300))
def test_random_bytes_are_a_protocol_error(wire: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_envelope(wire)


@given(message=st.sampled_from(MESSAGES), at=st.integers(0, 10_000), byte=st.integers(0, 255), end=st.integers(0, 400))
def test_mutated_messages_parse_or_are_a_protocol_error(message: Message, at: int, byte: int, end: int) -> None:
    wire = bytearray(encode(message, SENDER, "print"))
    wire[at % len(wire)] = byte
    try:
        decode_body(decode_envelope(bytes(wire[: end or None])))
    except ProtocolError:
        return
