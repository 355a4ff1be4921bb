"""The words between the cache servers of two hosts, each one MessagePack message over ZMQ.

    asker (DEALER) ── Hello ──────▶ holder (ROUTER)     my version, and where blocks may be written
                   ◀── Welcome ──                       or why not
                   ── Subscribe ──▶
                   ◀── Known, then Changed ──           every complete block in pieces, then what came and went
                   ── Fetch ──────▶                     the block is written over transport/, a Sealed behind it
                   ◀── Missing, Refused ──              or it is not there, or cannot be sent
                   ◀── Alive ────▶                      both, when there is nothing else to say

Keys travel joined, KEY_BYTES each. Hello and Welcome keep their form in every version, so that two versions can tell
each other apart.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from core.errors import ProtocolError
from kvcache.keys import KEY_BYTES

VERSION = 1
"""History. 1: Hello, Welcome, Subscribe, Known, Changed, Fetch, Missing, Refused, Alive; Sealed as the notice."""

MAX_KEYS = 4096
"""In one message."""

MAX_DESCRIPTION_BYTES = 16 << 10
MAX_MESSAGE_BYTES = 2 * MAX_KEYS * KEY_BYTES + (16 << 10)

_Number = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
_Digest = Annotated[int, msgspec.Meta(ge=0)]  # MessagePack has no integer beyond 64 bits
_Key = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
_Keys = Annotated[bytes, msgspec.Meta(max_length=MAX_KEYS * KEY_BYTES)]
_Why = Annotated[str, msgspec.Meta(max_length=1024)]


class _Word(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """Base of every word."""


class Hello(_Word, frozen=True):
    """The first word of a connection. description: of the asker's transport, whose region 0 is where blocks land."""

    version: _Number
    description: Annotated[bytes, msgspec.Meta(max_length=MAX_DESCRIPTION_BYTES)]


class Welcome(_Word, frozen=True):
    """why: the refusal, empty if welcome."""

    version: _Number
    why: _Why = ""


class Subscribe(_Word, frozen=True):
    """Tell me what you have, and from then on what changes."""


class Known(_Word, frozen=True):
    """Complete blocks of the holder. is_first: forget what you were told before."""

    keys: _Keys
    is_first: bool


class Changed(_Word, frozen=True):
    """Blocks that can be found from now on, and blocks that cannot any more."""

    added: _Keys
    removed: _Keys


class Fetch(_Word, frozen=True):
    """Write this block of num_bytes into block `place` of my region 0, under this tag."""

    number: _Number
    key: _Key
    num_bytes: Annotated[int, msgspec.Meta(ge=1, lt=1 << 40)]
    place: _Number
    tag: Annotated[str, msgspec.Meta(max_length=64)]


class Missing(_Word, frozen=True):
    """The block of Fetch(number) is not there, or has another size."""

    number: _Number


class Refused(_Word, frozen=True):
    """The block of Fetch(number) cannot be sent."""

    number: _Number
    why: _Why


class Alive(_Word, frozen=True):
    """There is nothing else to say."""


class Sealed(_Word, frozen=True):
    """The notice behind a block's bytes: the digest that its engine took, and `tier.seal` over what was sent."""

    digest: _Digest
    seal: _Digest


ToHolder = Hello | Subscribe | Fetch | Alive
ToAsker = Welcome | Known | Changed | Missing | Refused | Alive

_BAD_INPUT = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_encoder = msgspec.msgpack.Encoder()
_holder_decoder: msgspec.msgpack.Decoder[ToHolder] = msgspec.msgpack.Decoder(ToHolder)
_asker_decoder: msgspec.msgpack.Decoder[ToAsker] = msgspec.msgpack.Decoder(ToAsker)
_seal_decoder: msgspec.msgpack.Decoder[Sealed] = msgspec.msgpack.Decoder(Sealed)


def encode(word: ToHolder | ToAsker | Sealed) -> bytes:
    """One word as it travels."""
    return _encoder.encode(word)


def decode_at_holder(message: bytes | memoryview) -> ToHolder:
    """Raises ProtocolError."""
    try:
        return _holder_decoder.decode(message)
    except _BAD_INPUT as error:
        raise ProtocolError(f"not a word for the holder of blocks: {error}") from error


def decode_at_asker(message: bytes | memoryview) -> ToAsker:
    """Raises ProtocolError."""
    try:
        return _asker_decoder.decode(message)
    except _BAD_INPUT as error:
        raise ProtocolError(f"not a word of a holder of blocks: {error}") from error


def decode_sealed(notice: bytes) -> Sealed:
    """Raises ProtocolError."""
    try:
        return _seal_decoder.decode(notice)
    except _BAD_INPUT as error:
        raise ProtocolError(f"not the notice behind a block: {error}") from error
