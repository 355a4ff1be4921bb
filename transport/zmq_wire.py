"""What the zmq transport sends: typed headers, MessagePack, decoded strictly; and how a write is cut into frames.

    sender (DEALER) ── Hello(token) ──▶ receiver (ROUTER)    ◀── Welcome ──
                    ── Data + payload, Notice, Ask ──▶       ◀── Ack(numbers), Nack(number, why), Answer + payload ──

Every frame of one connection has a number; the receiver answers each exactly once: Ack when its bytes are in place,
Nack when they never will be, Answer for an Ask. The token is in the description only, so a connection that was not
meant for this very transport, or that came back after a break, is not listened to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, NamedTuple

import msgspec

from core.errors import TransferError
from transport.address import is_address
from transport.base import Region
from transport.regions import MAX_NOTICE_BYTES, MAX_TAG_CHARACTERS, check_region

FRAME_BYTES = 1 << 20
MAX_IDS_PER_FRAME = 2048
MAX_FRAMES_IN_FLIGHT = 64
WINDOW_BYTES = 16 << 20
MAX_PART_BYTES = FRAME_BYTES + (64 << 10)
MAX_DESCRIPTION_BYTES = 1 << 20
MAX_REGIONS = 1 << 14

_Number = Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 50)]
_Ids = Annotated[list[_Number], msgspec.Meta(min_length=1, max_length=MAX_IDS_PER_FRAME)]
_Tag = Annotated[str, msgspec.Meta(max_length=MAX_TAG_CHARACTERS)]


class _Frame(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """Base of every header."""


class Hello(_Frame, frozen=True):
    """The first frame of a connection."""

    token: Annotated[str, msgspec.Meta(max_length=64)]


class Data(_Frame, frozen=True):
    """A payload for `num_bytes` from `start` of each of these blocks, one after the other."""

    number: _Number
    tag: _Tag
    region: _Number
    ids: _Ids
    start: _Number
    num_bytes: _Count


class Notice(_Frame, frozen=True):
    """Everything written under this tag before has been sent."""

    number: _Number
    tag: _Tag
    notice: Annotated[bytes, msgspec.Meta(max_length=MAX_NOTICE_BYTES)]


class Ask(_Frame, frozen=True):
    """Please answer with these bytes, at most one frame of them."""

    number: _Number
    region: _Number
    ids: _Ids
    start: _Number
    num_bytes: _Count


class Welcome(_Frame, frozen=True):
    """Go ahead."""


class Ack(_Frame, frozen=True):
    """These frames are applied."""

    numbers: Annotated[list[_Number], msgspec.Meta(max_length=MAX_FRAMES_IN_FLIGHT * 4)]


class Nack(_Frame, frozen=True):
    """This frame will never be applied."""

    number: _Number
    why: Annotated[str, msgspec.Meta(max_length=1024)]


class Answer(_Frame, frozen=True):
    """The payload behind this header is what was asked for."""

    number: _Number


ToReceiver = Hello | Data | Notice | Ask
ToSender = Welcome | Ack | Nack | Answer


class RegionShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A region of the receiver, without its address."""

    id: _Number
    block_bytes: _Count
    num_blocks: _Count


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


def shape_region(shape: RegionShape) -> Region:
    """The region as far as a peer knows it: addresses mean nothing here."""
    region = Region(shape.id, 0, shape.block_bytes, shape.block_bytes, shape.num_blocks)
    check_region(region)
    return region


class Piece(NamedTuple):
    """One frame's share of a transfer: pairs first to last (excluded), and the byte range inside each block."""

    first: int
    last: int
    start: int
    num_bytes: int


def cut(num_pairs: int, start: int, num_bytes: int) -> Iterator[Piece]:
    """Pieces of at most FRAME_BYTES: several whole spans, or parts of one."""
    if num_bytes > FRAME_BYTES:
        for pair in range(num_pairs):
            for offset in range(0, num_bytes, FRAME_BYTES):
                yield Piece(pair, pair + 1, start + offset, min(FRAME_BYTES, num_bytes - offset))
        return
    pairs_per_frame = min(FRAME_BYTES // num_bytes, MAX_IDS_PER_FRAME)
    for first in range(0, num_pairs, pairs_per_frame):
        yield Piece(first, min(first + pairs_per_frame, num_pairs), start, num_bytes)
