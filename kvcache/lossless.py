"""Codecs that give back every bit: raw, zstd and lz4, the latter two over byte planes.

    numbers    s0 e0 m0 m0' ┃ s1 e1 m1 m1' ┃ ...          float32; bfloat16 is two of them in a row
    planes     all 1st bytes ┃ all 2nd ┃ all 3rd ┃ all 4th ┃ the bytes left over, unsplit

Signs and exponents of neighbours are alike, the low bytes of fractions are noise: side by side they hide each other,
plane by plane the alike ones shrink and the noise is passed through. Planes of every fourth byte suit numbers of two
bytes as well (see PLANES), so nothing need be known of a block.

Memory model: encoding holds the planes and the compressed bytes, decoding the planes: once the block's size each.
Threading: any thread; zstd's contexts belong to one thread each. Copies and compression need no interpreter lock.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from kvcache.codec import CodecError, Header, framed, opened
from kvcache.shape import BlockShape

if TYPE_CHECKING:
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]

PLANES = 4
"""Split in four, bfloat16 compresses as if split in two: planes 1 and 3 are both signs and exponents."""

ZSTD_LEVEL = 1
"""Higher levels look for repetitions, of which there are none."""


class RawCodec:
    """The block as it is, behind a header. See kvcache/codec.py."""

    name = "raw"
    is_lossless = True
    error_share = 0.0

    def __init__(self, code: int = 0) -> None:
        """code: of raw blocks that are to be kept apart from others."""
        self.code = code

    def encode(self, block: memoryview, shape: BlockShape | None) -> bytes:
        return framed(Header(self.code, shape, len(block)), bytes(block))

    def decode(self, data: memoryview, into: memoryview) -> None:
        _, payload = opened(self, data, len(into))
        if len(payload) != len(into):
            raise CodecError(f"{len(payload)} bytes are no block of {len(into)}")
        into[:] = payload


class ZstdCodec:
    """Zstandard over byte planes. See kvcache/codec.py."""

    name = "zstd"
    code = 1
    is_lossless = True
    error_share = 0.0

    def __init__(self) -> None:
        """Raises ImportError without the library `zstandard`."""
        import zstandard

        self._library = zstandard
        self._contexts = threading.local()

    def encode(self, block: memoryview, shape: BlockShape | None) -> bytes:
        if not hasattr(self._contexts, "compressor"):
            self._contexts.compressor = self._library.ZstdCompressor(level=ZSTD_LEVEL)
        payload: bytes = self._contexts.compressor.compress(split(block))
        return framed(Header(self.code, shape, len(block)), payload)

    def decode(self, data: memoryview, into: memoryview) -> None:
        _, payload = opened(self, data, len(into))
        if not hasattr(self._contexts, "decompressor"):
            self._contexts.decompressor = self._library.ZstdDecompressor()
        try:
            # The library allocates what the frame says; asked first, so that no frame can ask for more than a block.
            num_bytes = self._library.frame_content_size(payload)
            if num_bytes != len(into):
                raise CodecError(f"a frame of {num_bytes} bytes is no block of {len(into)}")
            planes = self._contexts.decompressor.decompress(payload, allow_extra_data=False)
        except self._library.ZstdError as error:
            raise CodecError(f"not a block that zstd has made: {error}") from error
        join(planes, into)


class Lz4Codec:
    """LZ4 over byte planes. See kvcache/codec.py."""

    name = "lz4"
    code = 2
    is_lossless = True
    error_share = 0.0

    def __init__(self) -> None:
        """Raises ImportError without the library `lz4`."""
        import lz4.block

        self._library = lz4.block

    def encode(self, block: memoryview, shape: BlockShape | None) -> bytes:
        payload: bytes = self._library.compress(split(block), store_size=False)
        return framed(Header(self.code, shape, len(block)), payload)

    def decode(self, data: memoryview, into: memoryview) -> None:
        _, payload = opened(self, data, len(into))
        try:
            planes = self._library.decompress(payload, uncompressed_size=len(into))
        except (self._library.LZ4BlockError, ValueError) as error:
            raise CodecError(f"not a block that lz4 has made: {error}") from error
        if len(planes) != len(into):
            raise CodecError(f"{len(planes)} bytes are no block of {len(into)}")
        join(planes, into)


def split(block: memoryview) -> Bytes:
    """The bytes plane by plane, then those left over; a copy."""
    source = np.frombuffer(block, np.uint8)
    planes = np.empty_like(source)
    whole = len(source) - len(source) % PLANES
    _turn(source[:whole].reshape(-1, PLANES), planes[:whole].reshape(PLANES, -1).T)
    planes[whole:] = source[whole:]
    return planes


def join(planes: bytes, into: memoryview) -> None:
    """Puts what `split` has made back in order."""
    source, target = np.frombuffer(planes, np.uint8), np.frombuffer(into, np.uint8)
    whole = len(source) - len(source) % PLANES
    _turn(source[:whole].reshape(PLANES, -1).T, target[:whole].reshape(-1, PLANES))
    target[whole:] = source[whole:]


def _turn(source: Bytes, target: Bytes) -> None:
    """Copies (numbers, planes), plane by plane: numpy's own order of a transposed copy takes longer."""
    for plane in range(source.shape[1]):
        target[:, plane] = source[:, plane]
