"""What a write or read is cut into where the receiver sees what arrives (zmq, ucx): typed headers, MessagePack, decoded
strictly.

    sender ── Data + payload, Notice, Ask ──▶ receiver      ◀── Ack(numbers), Nack(number, why), Answer + payload ──

Every frame of one connection has a number; the receiver answers each exactly once: Ack when its bytes are in place,
Nack when they never will be, Answer for an Ask.

Memory and threading: pure functions and facts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, NamedTuple

import msgspec

from transport.base import Region
from transport.regions import MAX_NOTICE_BYTES, MAX_TAG_CHARACTERS, check_region

FRAME_BYTES = 1 << 20
MAX_IDS_PER_FRAME = 2048
MAX_FRAMES_IN_FLIGHT = 64

Number = Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 50)]
Ids = Annotated[list[Number], msgspec.Meta(min_length=1, max_length=MAX_IDS_PER_FRAME)]
Tag = Annotated[str, msgspec.Meta(max_length=MAX_TAG_CHARACTERS)]


class Frame(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """Base of every header."""


class Data(Frame, frozen=True):
    """A payload for `num_bytes` from `start` of each of these blocks, one after the other."""

    number: Number
    tag: Tag
    region: Number
    ids: Ids
    start: Number
    num_bytes: Count


class Notice(Frame, frozen=True):
    """Everything written under this tag before has been sent."""

    number: Number
    tag: Tag
    notice: Annotated[bytes, msgspec.Meta(max_length=MAX_NOTICE_BYTES)]


class Ask(Frame, frozen=True):
    """Please answer with these bytes, at most one frame of them."""

    number: Number
    region: Number
    ids: Ids
    start: Number
    num_bytes: Count


class Ack(Frame, frozen=True):
    """These frames are applied."""

    numbers: Annotated[list[Number], msgspec.Meta(max_length=MAX_FRAMES_IN_FLIGHT * 4)]


class Nack(Frame, frozen=True):
    """This frame will never be applied."""

    number: Number
    why: Annotated[str, msgspec.Meta(max_length=1024)]


class Answer(Frame, frozen=True):
    """The payload behind this header is what was asked for."""

    number: Number


class RegionShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A region of the receiver, without its address."""

    id: Number
    block_bytes: Count
    num_blocks: Count


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


def cut(num_pairs: int, start: int, num_bytes: int, frame_bytes: int = FRAME_BYTES) -> Iterator[Piece]:
    """Pieces of at most frame_bytes: several whole spans, or parts of one."""
    if num_bytes > frame_bytes:
        for pair in range(num_pairs):
            for offset in range(0, num_bytes, frame_bytes):
                yield Piece(pair, pair + 1, start + offset, min(frame_bytes, num_bytes - offset))
        return
    pairs_per_frame = min(frame_bytes // num_bytes, MAX_IDS_PER_FRAME)
    for first in range(0, num_pairs, pairs_per_frame):
        yield Piece(first, min(first + pairs_per_frame, num_pairs), start, num_bytes)
