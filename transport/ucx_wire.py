"""What the ucx transport says: a handshake over a TCP connection of its own, then frames as UCX messages.

    sender                                             receiver, listens on the host's address alone
      ── TCP: Hello(proof, UCX address, id) ──▶            checks version, then proof; only then UCX hears of the peer
      ◀── TCP: Welcome(proof, UCX address, id) or Refusal(why) ──
      ── UCX control: [Parcel, Notice, Ask, ...] ──▶       ── UCX payload of a Parcel, under its number ──▶
      ◀── UCX control: [Ack, Nack, Answer, ...] ──         ◀── UCX payload of an Answer, under its number ──

A UCX tag is (id of the connection, as its receiver chose it) << 32 | is it a payload << 31 | number. The TCP
connection stays: its end is the end of the peer. Its messages start with a magic word and PROTOCOL_VERSION, so that
any version can tell any other what it is.

History of PROTOCOL_VERSION: 1, the first; 2, payloads of 1 MiB (before: 128 KiB); 3, several writes in one payload.

Memory and threading: pure functions and facts.
"""

from __future__ import annotations

import hmac
import struct
from typing import Annotated

import msgspec

from core.errors import ProtocolError, TransferError
from transport.address import is_address
from transport.frames import Ack, Answer, Ask, Count, Data, Frame, Ids, Nack, Notice, Number, RegionShape, Tag

PROTOCOL_VERSION = 3
MAX_MESSAGE_BYTES = 1 << 20
"""Of one UCX message: a payload, or a batch of frames."""

MAX_PARTS = 64
BATCH_BYTES = 8 << 10
"""A batch of frames is sent when it has grown so large, or when nothing more is to be said."""

WINDOW_BYTES = 8 << 20
MAX_FRAMES_IN_FLIGHT = 128
MAX_GREETING_BYTES = 32 << 10
MAX_DESCRIPTION_BYTES = 1 << 20
MAX_REGIONS = 1 << 14

ID_SHIFT = 32
PAYLOAD_BIT = 1 << 31
NUMBER_MASK = PAYLOAD_BIT - 1
ID_MASK = (1 << 32) - 1 << ID_SHIFT
EVERY_BIT = (1 << 64) - 1

_MAGIC = b"BatonUCX"
_HEAD = struct.Struct(">8sHI")
_Token = Annotated[str, msgspec.Meta(max_length=64)]
_Proof = Annotated[bytes, msgspec.Meta(max_length=64)]
_UcxAddress = Annotated[bytes, msgspec.Meta(min_length=1, max_length=16 << 10)]
_Id = Annotated[int, msgspec.Meta(ge=1, lt=1 << 32)]


class Part(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a parcel has for a region: `num_bytes` from `start` of each of these blocks, one after the other."""

    region: Number
    ids: Ids
    start: Number
    num_bytes: Count

    def size(self) -> int:
        """In bytes."""
        return len(self.ids) * self.num_bytes


class Parcel(Frame, frozen=True):
    """A payload for these parts, one after the other; where there are several, of several writes under one tag."""

    number: Number
    tag: Tag
    parts: Annotated[list[Part], msgspec.Meta(min_length=1, max_length=MAX_PARTS)]

    def size(self) -> int:
        """Of the payload, in bytes."""
        return sum(part.size() for part in self.parts)


ToReceiver = Parcel | Notice | Ask
ToSender = Ack | Nack | Answer


class Hello(Frame, frozen=True):
    """The first words of a sender. id: the number under which it wants to be written to. proof: see
    `is_proven`."""

    proof: _Proof
    address: _UcxAddress
    id: _Id


class Welcome(Frame, frozen=True):
    """Go ahead."""

    proof: _Proof
    address: _UcxAddress
    id: _Id


class Refusal(Frame, frozen=True):
    """The receiver hangs up now."""

    why: Annotated[str, msgspec.Meta(max_length=1024)]


class _Label(msgspec.Struct, frozen=True):
    """What every version's description begins with."""

    scheme: str
    version: int


class UcxDescription(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the receiver listens, its secret for this boot, and its regions; on_device: those in a GPU's memory."""

    scheme: str
    version: int
    address: Annotated[str, msgspec.Meta(max_length=300)]
    token: _Token
    regions: Annotated[list[RegionShape], msgspec.Meta(max_length=MAX_REGIONS)]
    on_device: Annotated[list[Number], msgspec.Meta(max_length=MAX_REGIONS)] = []


_LABEL = msgspec.msgpack.Decoder(_Label)
_DESCRIPTION = msgspec.msgpack.Decoder(UcxDescription)
_GREETING: msgspec.msgpack.Decoder[Hello | Welcome | Refusal] = msgspec.msgpack.Decoder(Hello | Welcome | Refusal)
_TO_RECEIVER: msgspec.msgpack.Decoder[list[ToReceiver]] = msgspec.msgpack.Decoder(list[ToReceiver])
_TO_SENDER: msgspec.msgpack.Decoder[list[ToSender]] = msgspec.msgpack.Decoder(list[ToSender])
_ENCODER = msgspec.msgpack.Encoder()
_BAD_INPUT = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def encode(what: ToReceiver | ToSender | UcxDescription) -> bytes:
    """One frame of a batch, or a description."""
    return _ENCODER.encode(what)


def part_of(data: Data) -> Part:
    """What a transfer would send as a frame of its own."""
    return Part(data.region, data.ids, data.start, data.num_bytes)


def batch(encoded: list[bytes]) -> bytes:
    """One control message of at most 65,535 frames."""
    return b"".join((b"\xdc", len(encoded).to_bytes(2, "big"), *encoded))


def decode_to_receiver(message: memoryview) -> list[ToReceiver] | None:
    """None if it is malformed."""
    try:
        return _TO_RECEIVER.decode(message)
    except _BAD_INPUT:
        return None


def decode_to_sender(message: memoryview) -> list[ToSender] | None:
    """None if it is malformed."""
    try:
        return _TO_SENDER.decode(message)
    except _BAD_INPUT:
        return None


def hello(token: str, address: bytes, id_: int) -> Hello:
    """A sender's first words."""
    return Hello(_proof(token, b"hello", address, id_), address, id_)


def welcome(token: str, address: bytes, id_: int) -> Welcome:
    """A receiver's answer."""
    return Welcome(_proof(token, b"welcome", address, id_), address, id_)


def is_proven(greeting: Hello | Welcome, token: str) -> bool:
    """Whether its author knows the token. UCX aborts the process over a malformed address, so it hears of none that
    comes from anybody else."""
    word = b"hello" if isinstance(greeting, Hello) else b"welcome"
    return hmac.compare_digest(greeting.proof, _proof(token, word, greeting.address, greeting.id))


def _proof(token: str, word: bytes, address: bytes, id_: int) -> bytes:
    return hmac.digest(token.encode(), b"%s %d %s" % (word, id_, address), "sha256")


def encode_greeting(greeting: Hello | Welcome | Refusal, version: int = PROTOCOL_VERSION) -> bytes:
    """One message of the handshake."""
    body = _ENCODER.encode(greeting)
    return _HEAD.pack(_MAGIC, version, len(body)) + body


def decode_greeting(arrived: bytearray) -> Hello | Welcome | Refusal | None:
    """None while it is incomplete. Raises ProtocolError if it is no greeting, or one of another version."""
    if not _MAGIC.startswith(bytes(arrived[: len(_MAGIC)])):
        raise ProtocolError("it is not a Baton ucx transport")
    if len(arrived) < _HEAD.size:
        return None
    _, version, num_bytes = _HEAD.unpack_from(arrived)
    if version != PROTOCOL_VERSION:
        raise ProtocolError(f"it speaks version {version} of the ucx protocol, this side version {PROTOCOL_VERSION}")
    if num_bytes > MAX_GREETING_BYTES:
        raise ProtocolError(f"its greeting of {num_bytes} bytes is larger than {MAX_GREETING_BYTES}")
    if len(arrived) < _HEAD.size + num_bytes:
        return None
    try:
        return _GREETING.decode(memoryview(arrived)[_HEAD.size : _HEAD.size + num_bytes])
    except _BAD_INPUT as error:
        raise ProtocolError(f"its greeting is malformed: {error}") from error


def decode_description(wire: bytes) -> UcxDescription:
    """Raises TransferError if it does not parse, is of another version or names an impossible address or region."""
    if len(wire) > MAX_DESCRIPTION_BYTES:
        raise TransferError(f"a description of {len(wire)} bytes is too large")
    try:
        label = _LABEL.decode(wire)
    except _BAD_INPUT as error:
        raise TransferError(f"not a ucx description: {error}") from error
    if label.scheme != "ucx":
        raise TransferError(f"a description of {label.scheme!r} is not one of ucx")
    if label.version != PROTOCOL_VERSION:
        raise TransferError(
            f"the peer speaks version {label.version} of the ucx protocol, this side version {PROTOCOL_VERSION}"
        )
    try:
        description = _DESCRIPTION.decode(wire)
    except _BAD_INPUT as error:
        raise TransferError(f"not a ucx description: {error}") from error
    if not is_address(description.address):
        raise TransferError(f"{description.address!r} is not of the form tcp://host:port")
    if len({shape.id for shape in description.regions}) != len(description.regions):
        raise TransferError("a ucx description names a region twice")
    return description


def payload_tag(id_: int, number: int) -> int:
    """Of the payload under this number."""
    return id_ << ID_SHIFT | PAYLOAD_BIT | number & NUMBER_MASK


def control_tag(id_: int) -> int:
    """Of a batch of frames."""
    return id_ << ID_SHIFT
