"""What the zmq transport sends: typed headers, MessagePack, decoded strictly; and how a write is cut into frames.

    sender (DEALER) ── Hello(token) ──▶ receiver (ROUTER)    ◀── Welcome ──
                    ── Data + payload, Notice, Ask ──▶       ◀── Ack(numbers), Nack(number, why), Answer + payload ──

Every frame of one connection has a number; the receiver answers each exactly once: Ack when its bytes are in place,
Nack when they never will be, Answer for an Ask. The token is in the description only, so a connection that was not
meant for this very transport, or that came back after a break, is not listened to.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from core.errors import TransferError
from transport.address import is_address
from transport.frames import FRAME_BYTES as FRAME_BYTES
from transport.frames import MAX_FRAMES_IN_FLIGHT as MAX_FRAMES_IN_FLIGHT
from transport.frames import Ack as Ack
from transport.frames import Answer as Answer
from transport.frames import Ask as Ask
from transport.frames import Data as Data
from transport.frames import Frame
from transport.frames import Nack as Nack
from transport.frames import Notice as Notice
from transport.frames import Piece as Piece
from transport.frames import RegionShape as RegionShape
from transport.frames import cut as cut
from transport.frames import shape_region as shape_region

WINDOW_BYTES = 16 << 20
MAX_PART_BYTES = FRAME_BYTES + (64 << 10)
MAX_DESCRIPTION_BYTES = 1 << 20
MAX_REGIONS = 1 << 14


class Hello(Frame, frozen=True):
    """The first frame of a connection."""

    token: Annotated[str, msgspec.Meta(max_length=64)]


class Welcome(Frame, frozen=True):
    """Go ahead."""


ToReceiver = Hello | Data | Notice | Ask
ToSender = Welcome | Ack | Nack | Answer


class ZmqDescription(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the receiver listens, its secret for this boot, and its regions."""

    address: Annotated[str, msgspec.Meta(max_length=300)]
    token: Annotated[str, msgspec.Meta(max_length=64)]
    regions: Annotated[list[RegionShape], msgspec.Meta(max_length=MAX_REGIONS)]


_DESCRIPTION = msgspec.msgpack.Decoder(ZmqDescription)
_TO_RECEIVER = msgspec.msgpack.Decoder(ToReceiver)
_TO_SENDER = msgspec.msgpack.Decoder(ToSender)
_ENCODER = msgspec.msgpack.Encoder()
_BAD_INPUT = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def encode(frame: ToReceiver | ToSender | ZmqDescription) -> bytes:
    """One header, or a description."""
    return _ENCODER.encode(frame)


def decode_to_receiver(header: bytes | memoryview) -> ToReceiver | None:
    """None if it is malformed."""
    try:
        frame: ToReceiver = _TO_RECEIVER.decode(header)
    except _BAD_INPUT:
        return None
    return frame


def decode_to_sender(header: bytes | memoryview) -> ToSender | None:
    """None if it is malformed."""
    try:
        frame: ToSender = _TO_SENDER.decode(header)
    except _BAD_INPUT:
        return None
    return frame


def decode_description(wire: bytes) -> ZmqDescription:
    """Raises TransferError if it does not parse or names an impossible address or region."""
    if len(wire) > MAX_DESCRIPTION_BYTES:
        raise TransferError(f"a description of {len(wire)} bytes is too large")
    try:
        description = _DESCRIPTION.decode(wire)
    except _BAD_INPUT as error:
        raise TransferError(f"not a zmq description: {error}") from error
    if not is_address(description.address):
        raise TransferError(f"{description.address!r} is not of the form tcp://host:port")
    if len({shape.id for shape in description.regions}) != len(description.regions):
        raise TransferError("a zmq description names a region twice")
    return description
