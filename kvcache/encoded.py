"""A tier whose blocks are encoded: around any other tier, which keeps what the codec makes of them.

    put:  block ──▶ codec ──▶ header ┃ payload ──▶ the tier inside      as it is, behind a header, where that is shorter
    get:  the tier inside ──▶ header ┃ payload ──▶ codec ──▶ the block in place ──▶ digest compared, or computed anew

A lossless block must have the digest that was put with it. A lossy one comes back as another block with a digest of
its own, and its tier says so by its name ("disk-int8"). A tier decodes what its own codec has made and no other:
whoever has not asked for a lossy one is never given less than the exact block. A block that cannot be decoded here is
removed, so that it can be put anew; one that was kept before the tier had a codec is given as it is.

Memory model: besides what the codec needs, one encoded block per call.
Threading: as the tier inside; one lock around the counters.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import msgspec

from kvcache.arena import block_digest
from kvcache.codec import HEADER_BYTES, Codec, CodecError, Header, header_of
from kvcache.keys import BlockKey
from kvcache.lossless import RawCodec
from kvcache.shape import KnownShapes
from kvcache.tier import Tier, TierFigures

_RAW_BESIDE = 128
"""Added to a lossy codec's code for blocks that its tier keeps as they are: they may have been computed after rounded
ones, so a tier with another codec refuses both."""


class EncodedTier:
    """See kvcache/tier.py. shapes: of blocks, by size, as far as the server's clients have named them."""

    def __init__(self, inner: Tier, codec: Codec, shapes: KnownShapes) -> None:
        self.lossy = inner.lossy if codec.is_lossless else codec.name
        self.name = inner.name if codec.is_lossless else f"{inner.name}-{codec.name}"
        self.is_written = inner.is_written
        self._inner = inner
        self._codec = codec
        self._raw = RawCodec(0 if codec.is_lossless else codec.code + _RAW_BESIDE)
        self._shapes = shapes
        self._lock = threading.Lock()
        self._encoded_bytes = 0
        self._corrupt = 0

    def contains(self, keys: Sequence[BlockKey]) -> int:
        """How many of the first keys are there, without a gap."""
        return self._inner.contains(keys)

    def get(self, key: BlockKey, into: memoryview) -> int | None:
        """Decodes a block into `into` and returns the digest of what stands there; None if there is no such block."""
        found = self._inner.get_whole(key, len(into) + HEADER_BYTES)
        if found is None:
            return None
        digest, data = found
        try:
            return self._decode(key, digest, data, into)
        except CodecError:
            self._discard(key)
            return None

    def get_whole(self, key: BlockKey, most_bytes: int) -> tuple[int, memoryview] | None:
        """As `get`, of a block whose size nobody knows."""
        found = self._inner.get_whole(key, most_bytes + HEADER_BYTES)
        if found is None:
            return None
        digest, data = found
        try:
            header = header_of(data)
            num_bytes = header.num_bytes if header else len(data)
            if num_bytes <= most_bytes:
                block = memoryview(bytearray(num_bytes))
                return self._decode(key, digest, data, block), block
        except CodecError:
            pass
        self._discard(key)
        return None

    def put(self, key: BlockKey, digest: int, block: memoryview) -> bool:
        """Encodes a block and keeps it; as it is, if it cannot be encoded or does not shrink."""
        data = self._encode(block)
        kept = self._inner.put(key, digest, memoryview(data))
        if kept:
            with self._lock:
                self._encoded_bytes += len(data)
        return kept

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """Forgets blocks."""
        self._inner.delete(keys)

    def clear(self) -> None:
        """Forgets every block."""
        self._inner.clear()

    def figures(self) -> TierFigures:
        """As of the tier inside, with what was put here and could not be decoded here."""
        inner = self._inner.figures()
        with self._lock:
            corrupt = inner.corrupt + self._corrupt
            return msgspec.structs.replace(inner, encoded_bytes=self._encoded_bytes, corrupt=corrupt)

    def close(self) -> None:
        self._inner.close()

    def _encode(self, block: memoryview) -> bytes:
        shape = self._shapes.of(len(block))
        try:
            data = self._codec.encode(block, shape)
            if len(data) < len(block):
                return data
        except CodecError:
            pass
        return self._raw.encode(block, shape)

    def _decode(self, key: BlockKey, digest: int, data: memoryview, into: memoryview) -> int:
        """The digest of what then stands in `into`. Raises CodecError."""
        header = header_of(data)
        if header is None:
            if len(data) != len(into):
                raise CodecError(f"{len(data)} bytes are no block of {len(into)}")
            into[:] = data
            return digest
        codec: Codec = self._raw if header.codec == self._raw.code else self._codec
        codec.decode(data, into)
        return _checked(codec, header, key, digest, into)

    def _discard(self, key: BlockKey) -> None:
        with self._lock:
            self._corrupt += 1
        self._inner.delete([key])


def _checked(codec: Codec, header: Header, key: BlockKey, digest: int, block: memoryview) -> int:
    """A lossless block's digest, as far as it can be told without its layers; a lossy block's, which is another."""
    if header.shape is None:
        return digest
    found = block_digest(key, block, header.shape.num_layers)
    if codec.is_lossless and found != digest:
        raise CodecError("a block is not the one that was put")
    return found
