"""`check_codec`: what every codec must do, for its own tests and for those of a codec that somebody else wrote."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from kvcache.codec import HEADER_BYTES, Codec, CodecError, Header, framed, header_of
from kvcache.elements import Floats, read_floats, write_floats
from kvcache.shape import ELEMENT_BYTES, BlockShape

_NUM_PARALLEL = 8
_GUARD_BYTES = 64
_HEADS = ((1, 1, 1), (3, 2, 7), (1, 4, 32), (2, 4, 512), (1, 6, 70_000))
"""Layers, heads in each (keys and values counted apart), numbers of a head."""

_HALF_A_STEP = {"bfloat16": (2**-8, 0.0), "float16": (2**-11, 2**-25), "float32": (2**-22, 0.0)}
"""What rounding to a dtype may add: a share of the number, and the least; float32 also for what is computed in it."""

_NO_NUMBERS = {
    "bfloat16": (0x7F80, 0xFF80, 0x7FC1),
    "float16": (0x7C00, 0xFC00, 0x7E01),
    "float32": (0x7F800000, 0xFF800000, 0x7FC00001),
}
"""Both infinities, and a NaN with a payload."""

_LEAST = float(np.finfo(np.float32).tiny)


def check_codec(codec: Codec) -> None:
    """Raises AssertionError where a codec breaks the contract: blocks of every dtype come back exactly or within the
    stated error, whatever is in them; bytes that the codec has not made are refused and nothing else is written."""
    assert codec.is_lossless == (codec.error_share == 0)
    for shape, num_bytes in _shapes():
        for what, block in _blocks(shape, num_bytes):
            _comes_back(codec, block, shape, f"{codec.name}, {what}, {shape}")
        _keeps_or_refuses_what_is_no_number(codec, shape, num_bytes)
    _takes_bytes_of_any_length(codec)
    _serves_many_threads(codec)
    _refuses_what_it_has_not_made(codec)
    _refuses_other_payloads(codec)


def _shapes() -> Iterator[tuple[BlockShape, int]]:
    """Shapes with the bytes of a block."""
    for dtype in ELEMENT_BYTES:
        for num_layers, num_heads, head_elements in _HEADS:
            shape = BlockShape(dtype, num_layers, head_elements)
            yield shape, num_layers * num_heads * shape.head_bytes


def _blocks(shape: BlockShape, num_bytes: int) -> Iterator[tuple[str, bytes]]:
    """Finite numbers of all kinds."""
    size = num_bytes // ELEMENT_BYTES[shape.dtype]
    dice = np.random.default_rng(size)
    normal = dice.standard_normal(size, np.float32)
    loud = np.where(np.arange(size) // shape.head_elements % 2, np.float32(300), np.float32(1e-3))
    kinds = {
        "zeros": np.zeros(size, np.float32),
        "negative zeros": -np.zeros(size, np.float32),
        "normal": normal,
        "heads of different size": normal * loud,
        "with an outlier": np.where(np.arange(size) == size // 2, np.float32(60_000), normal),
        "one value": np.full(size, np.float32(-1.7)),
        "all above zero": np.abs(normal) + np.float32(5),
        "denormals": normal * np.float32(1e-40),
        "float16's denormals": normal * np.float32(1e-7),
        "as large as can be": np.clip(normal, -1, 1) * np.float32(65504 if shape.dtype == "float16" else 9e37),
    }
    for what, values in kinds.items():
        block = bytearray(num_bytes)
        write_floats(values.astype(np.float32), shape.dtype, memoryview(block))
        yield what, bytes(block)


def _comes_back(codec: Codec, block: bytes, shape: BlockShape | None, what: str) -> None:
    data = codec.encode(memoryview(block), shape)
    assert data == codec.encode(memoryview(block), shape), f"{what}: the same block, other bytes"
    assert header_of(memoryview(data)) == Header(codec.code, shape, len(block)), what
    decoded = decoded_by(codec, data, len(block))
    if codec.is_lossless:
        assert decoded == block, f"{what}: not exact"
        return
    assert shape is not None, f"{what}: nothing says where a scale is due"
    before, after = (_heads(part, shape) for part in (block, decoded))
    largest = np.abs(before).max(axis=1, keepdims=True)
    share, least = _HALF_A_STEP[shape.dtype]
    allowed = largest * (codec.error_share + share) + _LEAST + least
    assert (np.abs(after - before) <= allowed).all(), f"{what}: beyond the stated error"


def _heads(block: bytes, shape: BlockShape) -> Floats:
    return read_floats(memoryview(block), shape.dtype).reshape(-1, shape.head_elements)


def decoded_by(codec: Codec, data: bytes, num_bytes: int) -> bytes:
    """What a codec decodes. Raises CodecError; AssertionError if it wrote beyond the block."""
    guard = bytes(range(_GUARD_BYTES))
    memory = bytearray(guard + bytes(num_bytes) + guard)
    try:
        codec.decode(memoryview(data), memoryview(memory)[_GUARD_BYTES : _GUARD_BYTES + num_bytes])
    finally:
        around = bytes(memory[:_GUARD_BYTES] + memory[_GUARD_BYTES + num_bytes :])
        assert around == guard + guard, "written past the block"
    return bytes(memory[_GUARD_BYTES : _GUARD_BYTES + num_bytes])


def _keeps_or_refuses_what_is_no_number(codec: Codec, shape: BlockShape, num_bytes: int) -> None:
    element_bytes = ELEMENT_BYTES[shape.dtype]
    for word in _NO_NUMBERS[shape.dtype]:
        block = bytes(num_bytes - element_bytes) + word.to_bytes(element_bytes, "little")
        if codec.is_lossless:
            _comes_back(codec, block, shape, f"{codec.name}, {word:x} as {shape.dtype}")
        else:
            assert _is_refused(codec, block, shape), f"{codec.name}: {word:x} as {shape.dtype} has no bounded error"


def _takes_bytes_of_any_length(codec: Codec) -> None:
    for num_bytes in (0, 1, 2, 3, 5, 64, 1023, 4096, 100_001):
        for block in (np.random.default_rng(num_bytes).bytes(num_bytes), bytes(num_bytes), b"abc" * num_bytes):
            if codec.is_lossless:
                _comes_back(codec, block, None, f"{codec.name}, {len(block)} bytes")
            else:
                assert _is_refused(codec, block, None), f"{codec.name}: no shape, no scale"
                assert _is_refused(codec, b"abc", BlockShape("float32", 1, 1)), f"{codec.name}: no whole number"


def _is_refused(codec: Codec, block: bytes, shape: BlockShape | None) -> bool:
    try:
        codec.encode(memoryview(block), shape)
    except CodecError:
        return True
    return False


def _serves_many_threads(codec: Codec) -> None:
    shape, num_bytes = BlockShape("bfloat16", 2, 512), 16_384
    blocks = [block for _, block in _blocks(shape, num_bytes)] * 4
    alone = [decoded_by(codec, codec.encode(memoryview(block), shape), num_bytes) for block in blocks]
    with ThreadPoolExecutor(_NUM_PARALLEL) as pool:
        data = pool.map(lambda block: codec.encode(memoryview(block), shape), blocks)
        together = list(pool.map(lambda encoded: decoded_by(codec, encoded, num_bytes), data))
    assert together == alone, f"{codec.name}: other blocks when there are several at once"


def _refuses_what_it_has_not_made(codec: Codec) -> None:
    shape = BlockShape("float32", 1, 16)
    block = _numbers(48)
    data = codec.encode(memoryview(block), shape)
    for length in range(len(data)):
        _refuses(codec, data[:length], len(block), f"the first {length} bytes")
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        _refuses(codec, bytes(flipped), len(block), f"bit {bit} flipped")
    payload = data[HEADER_BYTES:]
    other = framed(Header((codec.code + 1) % 256, shape, len(block)), payload)
    for name, wrong in (("one byte more", data + b"\0"), ("bytes", block), ("another codec's", other)):
        _refuses(codec, wrong, len(block), name)
    for num_bytes in (0, len(block) - 1, len(block) + 1, 4 * len(block)):
        _refuses(codec, data, num_bytes, f"for a block of {num_bytes} bytes")


def _refuses_other_payloads(codec: Codec) -> None:
    """Behind a header and a seal that fit: what an encoder with a mistake, or somebody with bad intent, would make."""
    shape = BlockShape("float32", 1, 16)
    block = _numbers(48)
    header = Header(codec.code, shape, len(block))
    payload = codec.encode(memoryview(block), shape)[HEADER_BYTES:]
    for length in range(len(payload)):
        _refuses(codec, framed(header, payload[:length]), len(block), f"a payload of {length} bytes")
    _refuses(codec, framed(header, payload + b"\0"), len(block), "a payload with a byte more")
    for seed in range(500):
        dice = np.random.default_rng(seed)
        garbage = dice.bytes(int(dice.integers(2 * len(payload))))
        spoiled = bytearray(payload)
        spoiled[seed % len(payload)] ^= int(dice.integers(1, 256))
        for wrong in (garbage, bytes(spoiled)):
            try:
                decoded_by(codec, framed(header, wrong), len(block))
            except CodecError:
                continue


def _refuses(codec: Codec, data: bytes, num_bytes: int, what: str) -> None:
    try:
        decoded_by(codec, data, num_bytes)
    except CodecError:
        return
    raise AssertionError(f"{codec.name} decodes {what}")


def _numbers(size: int) -> bytes:
    return np.random.default_rng(size).standard_normal(size).astype("<f4").tobytes()
