"""The words between the cache servers of two hosts, each one MessagePack message.

    over ZMQ     asker (DEALER) ── Hello ──────▶ holder (ROUTER)     my version
                                ◀── Welcome ──                       where blocks are read, or why not
                                ── Subscribe ──▶
                                ◀── Known, then Changed ──           every complete block, then what came and went
                                ◀── Alive ────▶                      both, when there is nothing else to say
    over streams asker ── Join ──▶ holder                            once per stream
                       ── Fetch ─▶
                       ◀── Found, the block's bytes, Sealed ──       or Missing

Keys travel joined, KEY_BYTES each. Hello and Welcome keep what they begin with in every version, so that two versions
can tell each other apart.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec

from core.errors import ProtocolError
from kvcache.keys import KEY_BYTES

VERSION = 1
"""History. 1: Hello, Welcome, Subscribe, Known, Changed, Alive; Join, Fetch, Found, Missing, Sealed."""

MAX_KEYS = 4096
"""In one message."""

MAX_MESSAGE_BYTES = 2 * MAX_KEYS * KEY_BYTES + 4096
MAX_ASKED_BYTES = 1024
"""The largest message that an asker sends over ZMQ."""

_Number = Annotated[int, msgspec.Meta(ge=0)]  # MessagePack has no integer beyond 64 bits
_Key = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
_Keys = Annotated[bytes, msgspec.Meta(max_length=MAX_KEYS * KEY_BYTES)]
_Token = Annotated[str, msgspec.Meta(max_length=64)]


class _Word(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of every word."""


class Hello(_Word, frozen=True):
    """The first word of a connection."""

    version: _Number


class Welcome(_Word, frozen=True):
    """why: the refusal, empty if welcome. Streams connect to `port` of the same host and join with `token`."""

    version: _Number
    why: Annotated[str, msgspec.Meta(max_length=1024)] = ""
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    token: _Token = ""


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


class Alive(_Word, frozen=True):
    """There is nothing else to say."""


class Join(_Word, frozen=True):
    """The first word of a stream."""

    token: _Token


class Fetch(_Word, frozen=True):
    """Send me this block, of so many bytes."""

    key: _Key
    num_bytes: Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]


class Found(_Word, frozen=True):
    """Its bytes follow, and then Sealed."""


class Missing(_Word, frozen=True):
    """It is not there, or has another size."""


class Sealed(_Word, frozen=True):
    """The digest that its engine took, and `tier.seal` over what was sent."""

    digest: _Number
    seal: _Number


ToHolder = Hello | Subscribe | Alive
ToAsker = Welcome | Known | Changed | Alive
Asked = Join | Fetch
Answered = Found | Missing | Sealed

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
_to_holder: msgspec.msgpack.Decoder[ToHolder] = msgspec.msgpack.Decoder(ToHolder)
_to_asker: msgspec.msgpack.Decoder[ToAsker] = msgspec.msgpack.Decoder(ToAsker)
_asked: msgspec.msgpack.Decoder[Asked] = msgspec.msgpack.Decoder(Asked)
_answered: msgspec.msgpack.Decoder[Answered] = msgspec.msgpack.Decoder(Answered)


def encode(word: ToHolder | ToAsker | Asked | Answered) -> bytes:
    """One word as it travels."""
    return _encoder.encode(word)


def decode_at_holder(message: bytes | memoryview) -> ToHolder:
    """Raises ProtocolError."""
    return _decode(_to_holder, message)


def decode_at_asker(message: bytes | memoryview) -> ToAsker:
    """Raises ProtocolError."""
    return _decode(_to_asker, message)


def decode_asked(message: bytes) -> Asked:
    """Raises ProtocolError."""
    return _decode(_asked, message)


def decode_answered(message: bytes) -> Answered:
    """Raises ProtocolError."""
    return _decode(_answered, message)


def _decode(decoder: msgspec.msgpack.Decoder[T], message: bytes | memoryview) -> T:
    try:
        return decoder.decode(message)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a word between cache servers: {error}") from error
