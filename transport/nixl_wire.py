"""What two NIXL transports say to each other beside NIXL, and the description that starts it.

    writer ── Hello(token, link, digest) ──▶ owner    ◀── Welcome(metadata) ── the owner's agent, as NIXL packs it
           ── Opening(tag) ──▶    ◀── Opened(tag) or Refused(tag, why) ──   before the first byte under a tag
           ── Busy(is_busy) ──▶                        drive progress: bytes are under way, or none are
           ── [NIXL notification: Notice] ──▶    ◀── Heard(number) ──       behind the data
           ◀── Shut(tag) ──    ── Stopped(tag) ──▶     the landing is closed; nothing moves under its tag any more

A frame is four bytes of length and MessagePack. A description is a magic word, the protocol's version, a keyed digest
and MessagePack; the key is the cluster's secret, where there is one. NIXL parses an agent's metadata in C++ with few
checks (a flipped bit can end the process), so the metadata travels on the connection and is loaded only if its digest
is the one in the description. What remains: whoever may send us descriptions, where no secret is set, can send a bad
agent with a good digest; and UCX's own sockets trust whoever connects to them, so they belong on a private network.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import Annotated

import msgspec

from core.errors import TransferError
from transport.address import is_address
from transport.base import Region
from transport.regions import MAX_NOTICE_BYTES, MAX_TAG_CHARACTERS, check_region

PROTOCOL_VERSION = 1
"""1: the first."""

MAX_DESCRIPTION_BYTES = 1 << 20
MAX_METADATA_BYTES = 32 << 20
MAX_FRAME_BYTES = MAX_METADATA_BYTES + 64
MAX_REGIONS = 1 << 14
MAX_BLOCKS = 1 << 32
DIGEST_BYTES = 32

_MAGIC = b"baton-nixl"
_HEAD = struct.Struct(f"<{len(_MAGIC)}sH{DIGEST_BYTES}s")
_LENGTH = struct.Struct("<I")

_Number = Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]
_Address = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 50)]
_Tag = Annotated[str, msgspec.Meta(max_length=MAX_TAG_CHARACTERS)]
_Word = Annotated[str, msgspec.Meta(max_length=128)]
_Digest = Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]


class _Frame(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """Base of every frame."""


class Hello(_Frame, frozen=True):
    """The first frame of a connection: what the description said, and the connection's own name, for its notices."""

    token: _Word
    link: _Word
    metadata_digest: _Digest


class Opening(_Frame, frozen=True):
    """May I write under this tag?"""

    tag: _Tag


class Busy(_Frame, frozen=True):
    """Whether writes of mine are under way: some need the owner's progress."""

    is_busy: bool


class Stopped(_Frame, frozen=True):
    """Nothing of mine moves under this tag, nor will before another Opening."""

    tag: _Tag


class Welcome(_Frame, frozen=True):
    """The owner's agent."""

    metadata: Annotated[bytes, msgspec.Meta(max_length=MAX_METADATA_BYTES)]


class Opened(_Frame, frozen=True):
    """You may write under this tag."""

    tag: _Tag


class Refused(_Frame, frozen=True):
    """You may not."""

    tag: _Tag
    why: Annotated[str, msgspec.Meta(max_length=1024)]


class Shut(_Frame, frozen=True):
    """The landing is closed: stop writing under this tag, and say so."""

    tag: _Tag


class Heard(_Frame, frozen=True):
    """This notice has arrived."""

    number: _Number


class Notice(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A NIXL notification: everything written under this tag before is in place."""

    link: _Word
    number: _Number
    tag: _Tag
    notice: Annotated[bytes, msgspec.Meta(max_length=MAX_NOTICE_BYTES)]


ToOwner = Hello | Opening | Busy | Stopped
ToWriter = Welcome | Opened | Refused | Shut | Heard


class RegionPlace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A region at its address in the owner's process. device: the GPU it lies on."""

    id: _Number
    address: _Address
    block_bytes: _Count
    stride: _Count
    num_blocks: Annotated[int, msgspec.Meta(ge=1, le=MAX_BLOCKS)]
    device: Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)] | None = None

    def region(self) -> Region:
        return Region(self.id, self.address, self.block_bytes, self.stride, self.num_blocks, self.device)


class NixlDescription(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the owner listens, its secret for this boot, its agent and its regions."""

    address: Annotated[str, msgspec.Meta(max_length=300)]
    token: _Word
    agent: _Word
    library: _Word
    backend: _Word
    metadata_digest: _Digest
    regions: Annotated[list[RegionPlace], msgspec.Meta(max_length=MAX_REGIONS)]


_DESCRIPTION = msgspec.msgpack.Decoder(NixlDescription)
_TO_OWNER = msgspec.msgpack.Decoder(ToOwner)
_TO_WRITER = msgspec.msgpack.Decoder(ToWriter)
_NOTICE = msgspec.msgpack.Decoder(Notice)
_ENCODER = msgspec.msgpack.Encoder()
_BAD_INPUT = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def metadata_digest(metadata: bytes) -> bytes:
    """What the description says of an agent's metadata."""
    return hashlib.blake2b(metadata, digest_size=DIGEST_BYTES).digest()


def encode_description(description: NixlDescription, secret: str, version: int = PROTOCOL_VERSION) -> bytes:
    """As it travels in an Accept."""
    body = _ENCODER.encode(description)
    return _HEAD.pack(_MAGIC, version, _sign(version, body, secret)) + body


def decode_description(wire: bytes, secret: str) -> NixlDescription:
    """Raises TransferError unless it is one of our version, undamaged, made with our secret, and possible."""
    if len(wire) > MAX_DESCRIPTION_BYTES:
        raise TransferError(f"a nixl description of {len(wire)} bytes is larger than {MAX_DESCRIPTION_BYTES}")
    if len(wire) < _HEAD.size or not wire.startswith(_MAGIC):
        raise TransferError("not a nixl description")
    _, version, digest = _HEAD.unpack_from(wire)
    if version != PROTOCOL_VERSION:
        raise TransferError(
            f"the peer's nixl transport speaks protocol version {version}, ours {PROTOCOL_VERSION}: "
            "run the same Baton on both sides"
        )
    body = wire[_HEAD.size :]
    if not hmac.compare_digest(digest, _sign(version, body, secret)):
        raise TransferError("the nixl description is damaged, or was made with another secret than ours")
    try:
        description = _DESCRIPTION.decode(body)
    except _BAD_INPUT as error:
        raise TransferError(f"not a nixl description: {error}") from error
    _check(description)
    return description


def is_description(wire: bytes) -> bool:
    """Whether it looks like one of our version."""
    return len(wire) >= _HEAD.size and _HEAD.unpack_from(wire)[:2] == (_MAGIC, PROTOCOL_VERSION)


def encode(frame: ToOwner | ToWriter) -> bytes:
    """One frame, with its length."""
    body = _ENCODER.encode(frame)
    return _LENGTH.pack(len(body)) + body


def encode_notice(notice: Notice) -> bytes:
    """A NIXL notification."""
    return _ENCODER.encode(notice)


def frame_bytes(buffer: bytearray) -> int | None:
    """How long the first frame in a buffer is, its length included; None if that is not known yet."""
    return _LENGTH.size + int(_LENGTH.unpack_from(buffer)[0]) if len(buffer) >= _LENGTH.size else None


def frame_body(frame: bytes) -> bytes:
    """A frame without its length."""
    return frame[_LENGTH.size :]


def decode_to_owner(body: bytes) -> ToOwner | None:
    """None if it is malformed."""
    try:
        frame: ToOwner = _TO_OWNER.decode(body)
    except _BAD_INPUT:
        return None
    return frame


def decode_to_writer(body: bytes) -> ToWriter | None:
    """None if it is malformed."""
    try:
        frame: ToWriter = _TO_WRITER.decode(body)
    except _BAD_INPUT:
        return None
    return frame


def decode_notice(body: bytes) -> Notice | None:
    """None if it is malformed."""
    try:
        return _NOTICE.decode(body)
    except _BAD_INPUT:
        return None


def _sign(version: int, body: bytes, secret: str) -> bytes:
    key = hashlib.blake2b(secret.encode(), digest_size=DIGEST_BYTES).digest()
    return hashlib.blake2b(version.to_bytes(2, "little") + body, digest_size=DIGEST_BYTES, key=key).digest()


def _check(description: NixlDescription) -> None:
    if not is_address(description.address):
        raise TransferError(f"{description.address!r} is not of the form tcp://host:port")
    if len({place.id for place in description.regions}) != len(description.regions):
        raise TransferError("a nixl description names a region twice")
    for place in description.regions:
        check_region(place.region())
        if place.address + (place.num_blocks - 1) * place.stride + place.block_bytes >= 1 << 63:
            raise TransferError(f"region {place.id} lies outside any memory")
