"""Codecs that keep numbers within a stated error, with scales per head: fp8, int8 and int4. Only for who asks for them.

    block ──▶ heads: one head's keys, or values, in one layer ──▶ scale(s) of the head, code of each number
    payload:  pieces of whole heads, each: scales ┃ codes

    fp8   scale = largest / 448      code: 8-bit float, 4 bits of exponent and 3 of fraction, nearest
    int8  scale = largest / 127      code: nearest of -127..127
    int4  low, high of each run of 32 numbers of a head    code: nearest of 16 steps from low to high, two in a byte

In blocks as vLLM's CPU attention packs them without AMX, a run is one channel of 32 tokens' keys, or 32 channels of one
token's values. Other packings keep the same bound.
A scale is never below float32's smallest normal number: heads that are smaller come out within half of that.

Memory model: a piece of about a million bytes is in work at a time, beside the payload. Threading: any thread.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from kvcache.codec import CodecError, Header, framed, opened
from kvcache.elements import Floats, read_floats, rounded_down, rounded_up, write_floats
from kvcache.shape import BlockShape

PIECE_ELEMENTS = 1 << 18
"""Of a piece, unless one head alone has more. Part of the format: encoder and decoder must cut alike."""

RUN_ELEMENTS = 32
LARGEST = 1e38
"""Beyond it float32 has no room for what is computed here."""

_ROOM = 1.01
"""Scales and ends are rounded: so much larger they may be."""

_LARGEST_INT8 = 127
_LARGEST_FLOAT8 = 448.0
_STEPS_INT4 = 15
_SMALLEST = np.finfo(np.float32).tiny

Codes = npt.NDArray[np.uint8]


class _HeadCodec:
    """What the three have in common: from blocks to pieces of whole heads and back."""

    name = ""
    code = -1
    is_lossless = False
    error_share = 0.0

    def encode(self, block: memoryview, shape: BlockShape | None) -> bytes:
        if shape is None:
            raise CodecError(f"{self.name} needs to know where heads lie in a block, and no client has said it")
        if not shape.fits(len(block)):
            raise CodecError(f"a block of {len(block)} bytes is none of {shape}")
        parts: list[bytes] = []
        for piece in _pieces(block, shape):
            heads = read_floats(piece, shape.dtype).reshape(-1, shape.head_elements)
            largest = np.abs(heads).max(axis=1, keepdims=True)
            if not (largest <= LARGEST).all():
                raise CodecError("a block with numbers that are not finite, or close to it, has no scale")
            parts += self._encode_heads(heads, largest)
        return framed(Header(self.code, shape, len(block)), b"".join(parts))

    def decode(self, data: memoryview, into: memoryview) -> None:
        header, payload = opened(self, data, len(into))
        shape = header.shape
        if shape is None:
            raise CodecError(f"a block of {self.name} without a shape")
        at = 0
        for piece in _pieces(into, shape):
            num_heads = len(piece) // shape.head_bytes
            num_bytes = self._piece_bytes(num_heads, shape.head_elements)
            part = payload[at : at + num_bytes]
            if len(part) != num_bytes:
                raise CodecError(f"{len(payload)} bytes of {self.name} do not fill a block of {len(into)}")
            heads = self._decode_heads(part, num_heads, shape.head_elements)
            if not np.isfinite(heads).all():
                raise CodecError("scales that are not finite are none of ours")
            write_floats(heads.reshape(-1), shape.dtype, piece)
            at += num_bytes
        if at != len(payload):
            raise CodecError(f"{len(payload)} bytes of {self.name} are more than a block of {len(into)}")

    def _encode_heads(self, heads: Floats, largest: Floats) -> list[bytes]:
        """heads: (heads, numbers), may be overwritten; largest: the magnitude of each, (heads, 1)."""
        raise NotImplementedError

    def _piece_bytes(self, num_heads: int, head_elements: int) -> int:
        raise NotImplementedError

    def _decode_heads(self, part: memoryview, num_heads: int, head_elements: int) -> Floats:
        raise NotImplementedError


class Int8Codec(_HeadCodec):
    """See kvcache/codec.py: whole steps of a scale per head."""

    name = "int8"
    code = 16
    error_share = 0.5 / _LARGEST_INT8

    def _encode_heads(self, heads: Floats, largest: Floats) -> list[bytes]:
        scales = _scales(largest, _LARGEST_INT8)
        np.divide(heads, scales, out=heads)
        np.rint(heads, out=heads)
        return [scales.tobytes(), heads.astype(np.int8).tobytes()]

    def _piece_bytes(self, num_heads: int, head_elements: int) -> int:
        return num_heads * (4 + head_elements)

    def _decode_heads(self, part: memoryview, num_heads: int, head_elements: int) -> Floats:
        scales, codes = _scaled(part, num_heads, _LARGEST_INT8)
        return codes.view(np.int8).reshape(num_heads, head_elements) * scales


class Float8Codec(_HeadCodec):
    """See kvcache/codec.py: floats of 8 bits (E4M3 without infinities) of a scale per head. A number differs by at most
    a sixteenth of itself; the stated share is that of the largest ones."""

    name = "fp8"
    code = 17
    error_share = 16 / _LARGEST_FLOAT8

    def _encode_heads(self, heads: Floats, largest: Floats) -> list[bytes]:
        scales = _scales(largest, _LARGEST_FLOAT8)
        np.divide(heads, scales, out=heads)
        return [scales.tobytes(), _to_float8(heads).tobytes()]

    def _piece_bytes(self, num_heads: int, head_elements: int) -> int:
        return num_heads * (4 + head_elements)

    def _decode_heads(self, part: memoryview, num_heads: int, head_elements: int) -> Floats:
        scales, codes = _scaled(part, num_heads, _LARGEST_FLOAT8)
        result: Floats = _FLOAT8_VALUES[codes].reshape(num_heads, head_elements) * scales
        return result


class Int4Codec(_HeadCodec):
    """See kvcache/codec.py: sixteen steps between the lowest and the highest of each run of a head. Heads that are no
    whole number of runs are one run each."""

    name = "int4"
    code = 18
    error_share = (1 + 2**-7) / _STEPS_INT4
    """Half a step of a run from -largest to largest, whose ends are rounded outwards to bfloat16."""

    def _encode_heads(self, heads: Floats, largest: Floats) -> list[bytes]:
        runs = heads.reshape(-1, _run_elements(heads.shape[1]))
        low = rounded_down(runs.min(axis=1, keepdims=True))
        high = rounded_up(runs.max(axis=1, keepdims=True))
        np.subtract(runs, low, out=runs)
        np.divide(runs, _int4_steps(low, high), out=runs)
        np.rint(runs, out=runs)
        np.minimum(runs, _STEPS_INT4, out=runs)
        codes = np.zeros(runs.size + runs.size % 2, np.uint8)
        codes[: runs.size] = runs.reshape(-1)
        ends = np.concatenate((low, high), axis=1).view(np.uint32) >> np.uint32(16)
        return [ends.astype("<u2").tobytes(), (codes[0::2] | codes[1::2] << np.uint8(4)).tobytes()]

    def _piece_bytes(self, num_heads: int, head_elements: int) -> int:
        num_elements = num_heads * head_elements
        return num_elements // _run_elements(head_elements) * 4 + (num_elements + 1) // 2

    def _decode_heads(self, part: memoryview, num_heads: int, head_elements: int) -> Floats:
        num_elements, run_elements = num_heads * head_elements, _run_elements(head_elements)
        ends_bytes = num_elements // run_elements * 4
        ends = read_floats(part[:ends_bytes], "bfloat16").reshape(-1, 2)
        low, high = ends[:, :1], ends[:, 1:]
        if not ((np.abs(ends) <= _ROOM * LARGEST).all() and (low <= high).all()):
            raise CodecError("ends of a run that are too large, or out of order, are none of ours")
        pairs = np.frombuffer(part[ends_bytes:], np.uint8)
        codes = np.empty((len(pairs), 2), np.uint8)
        np.bitwise_and(pairs, np.uint8(15), out=codes[:, 0])
        np.right_shift(pairs, np.uint8(4), out=codes[:, 1])
        runs = codes.reshape(-1)[:num_elements].astype(np.float32).reshape(-1, run_elements)
        np.multiply(runs, _int4_steps(low, high), out=runs)
        np.add(runs, low, out=runs)
        return runs


def _pieces(block: memoryview, shape: BlockShape) -> Iterator[memoryview]:
    """A block, some whole heads at a time."""
    step = max(1, PIECE_ELEMENTS // shape.head_elements) * shape.head_bytes
    for at in range(0, len(block), step):
        yield block[at : at + step]


def _run_elements(head_elements: int) -> int:
    return head_elements if head_elements % RUN_ELEMENTS else RUN_ELEMENTS


def _scales(largest: Floats, steps: float) -> Floats:
    result: Floats = np.maximum(largest / np.float32(steps), _SMALLEST)
    return result


def _scaled(part: memoryview, num_heads: int, steps: float) -> tuple[Floats, Codes]:
    """Scales (heads, 1) and codes of a piece that has one scale per head. Raises CodecError."""
    scales = np.frombuffer(part[: 4 * num_heads], "<f4").astype(np.float32)
    if not ((scales >= _SMALLEST) & (scales <= _ROOM * LARGEST / steps)).all():
        raise CodecError("a scale that is too large, or not positive, is none of ours")
    return scales.reshape(-1, 1), np.frombuffer(part[4 * num_heads :], np.uint8)


def _int4_steps(low: Floats, high: Floats) -> Floats:
    result: Floats = np.maximum((high - low) / np.float32(_STEPS_INT4), _SMALLEST)
    return result


def _to_float8(values: Floats) -> Codes:
    """The nearest floats of 8 bits, ties to even, of values up to _LARGEST_FLOAT8 in magnitude."""
    bits = values.view(np.uint32)
    signs = (bits >> np.uint32(24)) & np.uint32(0x80)
    magnitudes = bits & np.uint32(0x7FFFFFFF)
    # Below 2^-6 codes count steps of 2^-9; from there on they are the upper bits of a float32, its exponent shifted.
    small = np.rint(np.abs(values) * np.float32(512)).astype(np.uint32)
    large = (magnitudes + np.uint32(0x7FFFF) + ((magnitudes >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)
    codes = np.where(magnitudes < np.uint32(121 << 23), small, large - np.uint32(120 << 3))
    result: Codes = (codes | signs).astype(np.uint8)
    return result


def _float8_values() -> Floats:
    """What each code stands for; those of no number are infinite and so refused."""
    codes = np.arange(256)
    exponents, fractions = codes >> 3 & 15, codes & 7
    magnitudes = np.where(exponents == 0, fractions / 512, (1 + fractions / 8) * 2.0 ** (exponents - 7))
    magnitudes[codes & 127 == 127] = np.inf
    return np.where(codes & 128, -magnitudes, magnitudes).astype(np.float32)


_FLOAT8_VALUES = _float8_values()
