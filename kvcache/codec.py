"""What every codec does: a block to fewer bytes and back, exactly or within a stated error, or not at all.

    encoded block:  header ┃ payload
    header:         magic | version | codec | dtype | layers | head_elements | block's length | seal of all of it

The header says everything that decoding needs: a block is decoded after a restart, before any client has come.

Memory model: `encode` reads the block during the call; `decode` writes into `into` and nowhere else, and holds at most
a small multiple of its length. After a CodecError `into` holds anything.
Threading: any method from any thread.
"""

from __future__ import annotations

import struct
from typing import Protocol

import msgspec
import xxhash

from core.errors import BatonError
from kvcache.shape import BlockShape, Dtype

MAGIC = b"\xb5BtnEnc\x00"
FORMAT_VERSION = 1
"""History. 1: what `_HEAD` and `_SEAL` say, then the payload."""

_HEAD = struct.Struct("<8sBBBxIIQ")
_SEAL = struct.Struct("<Q")
HEADER_BYTES = _HEAD.size + _SEAL.size
_DTYPES: tuple[Dtype | None, ...] = (None, "bfloat16", "float16", "float32")


class CodecError(BatonError):
    """A block cannot be encoded, or bytes are not what this codec has made of a block of that size."""


class Header(msgspec.Struct, frozen=True):
    """codec: its `code`. shape: None if it was not known. num_bytes: of the block when it is decoded."""

    codec: int
    shape: BlockShape | None
    num_bytes: int

    def pack(self) -> bytes:
        """All but the seal."""
        shape = self.shape
        dtype, num_layers, head_elements = (
            (0, 0, 0) if shape is None else (_DTYPES.index(shape.dtype), shape.num_layers, shape.head_elements)
        )
        return _HEAD.pack(MAGIC, FORMAT_VERSION, self.codec, dtype, num_layers, head_elements, self.num_bytes)


class Codec(Protocol):
    """Bytes to fewer bytes. code: 0 to 127, the codec's own in headers. error_share: by how much a number may differ
    after decoding, as a share of the largest magnitude among its head's keys (or values) in its layer; what rounding to
    the block's own dtype adds is not in it. 0 if lossless."""

    name: str
    code: int
    is_lossless: bool
    error_share: float

    def encode(self, block: memoryview, shape: BlockShape | None) -> bytes:
        """The block with a header in front; the same bytes for the same block. Raises CodecError if it cannot be kept
        within the stated error: not finite, or of a shape that is not known or does not fit."""
        ...

    def decode(self, data: memoryview, into: memoryview) -> None:
        """Fills `into` (contiguous bytes, writable). Raises CodecError for anything but what `encode` has made of a
        block of that length."""
        ...


def framed(header: Header, payload: bytes) -> bytes:
    """An encoded block."""
    head = header.pack()
    return b"".join((head, _SEAL.pack(_seal(head, payload)), payload))


def header_of(data: memoryview) -> Header | None:
    """What stands in front of an encoded block; None if these are other bytes. Raises CodecError if it is damaged or
    of another version."""
    if len(data) < HEADER_BYTES or data[: len(MAGIC)] != MAGIC:
        return None
    _, version, codec, dtype, num_layers, head_elements, num_bytes = _HEAD.unpack_from(data)
    if version != FORMAT_VERSION:
        raise CodecError(f"an encoded block of format {version} is not read by format {FORMAT_VERSION}")
    name = _DTYPES[dtype] if dtype < len(_DTYPES) else None
    if (name is None) != (num_layers * head_elements == 0):
        raise CodecError("an encoded block's header names an impossible shape")
    shape = BlockShape(name, num_layers, head_elements) if name else None
    header = Header(codec, shape, num_bytes)
    if shape is not None and not shape.fits(num_bytes):
        raise CodecError("an encoded block's header names a shape that does not fit its length")
    return header


def opened(codec: Codec, data: memoryview, num_bytes: int) -> tuple[Header, memoryview]:
    """Header and payload of what `codec` has made of a block of num_bytes bytes. Raises CodecError."""
    header = header_of(data)
    if header is None:
        raise CodecError("not an encoded block")
    if header.codec != codec.code:
        raise CodecError(f"a block of codec {header.codec} is not one of {codec.name} ({codec.code})")
    if header.num_bytes != num_bytes:
        raise CodecError(f"an encoded block of {header.num_bytes} bytes does not fill {num_bytes}")
    payload = data[HEADER_BYTES:]
    if _SEAL.unpack_from(data, _HEAD.size)[0] != _seal(data[: _HEAD.size], payload):
        raise CodecError("an encoded block is damaged")
    return header, payload


def _seal(head: bytes | memoryview, payload: bytes | memoryview) -> int:
    hasher = xxhash.xxh3_64(head)
    hasher.update(payload)
    return int(hasher.intdigest())
