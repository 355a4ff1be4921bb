"""A codec gives back what it was given, exactly or within what it says, and takes nothing that it has not made."""

from __future__ import annotations

import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import ConfigError
from kvcache.codec import HEADER_BYTES, CodecError, Header, framed
from kvcache.codec_conformance import check_codec, decoded_by
from kvcache.codecs import CODECS, LOSSY, make_codec
from kvcache.elements import Floats, read_floats, write_floats
from kvcache.lossy import RUN_ELEMENTS
from kvcache.shape import BlockShape, Dtype, KnownShapes

LOSSLESS = tuple(name for name in CODECS if name not in LOSSY)
EIGHTH_BITS = np.array([*range(0x7F), *range(0x80, 0xFF)], np.uint8)
"""Every code of an 8-bit float that is a number."""


def bytes_of(values: Floats, dtype: Dtype = "float32") -> bytes:
    block = bytearray(values.size * (4 if dtype == "float32" else 2))
    write_floats(values.astype(np.float32).reshape(-1), dtype, memoryview(block))
    return bytes(block)


def normal(*shape: int) -> Floats:
    return np.random.default_rng(7).standard_normal(shape, np.float32)


def through(name: str, values: Floats, dtype: Dtype = "float32") -> Floats:
    """(heads, numbers) encoded and decoded."""
    codec, block = make_codec(name), bytes_of(values, dtype)
    data = codec.encode(memoryview(block), BlockShape(dtype, 1, values.shape[-1]))
    return read_floats(memoryview(decoded_by(codec, data, len(block))), dtype).reshape(values.shape)


def encoded_share(name: str, values: Floats, dtype: Dtype) -> float:
    block = bytes_of(values, dtype)
    return len(make_codec(name).encode(memoryview(block), BlockShape(dtype, 1, values.shape[-1]))) / len(block)


@pytest.mark.parametrize("name", CODECS)
def test_it_keeps_the_contract_of_every_codec(name: str) -> None:
    codec = make_codec(name)
    check_codec(codec)
    assert (codec.name, codec.is_lossless) == (name, name not in LOSSY)


def test_no_two_codecs_take_each_others_blocks() -> None:
    block = bytes_of(normal(4, 64))
    made = {name: make_codec(name).encode(memoryview(block), BlockShape("float32", 1, 64)) for name in CODECS}
    for maker, data in made.items():
        for name in CODECS:
            if name != maker:
                with pytest.raises(CodecError, match="is not one of"):
                    decoded_by(make_codec(name), data, len(block))


@settings(deadline=None)
@given(st.sampled_from(LOSSLESS), st.binary(max_size=300))
def test_lossless_codecs_give_back_any_bytes(name: str, block: bytes) -> None:
    codec = make_codec(name)
    assert decoded_by(codec, codec.encode(memoryview(block), None), len(block)) == block


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(LOSSY),
    st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1, max_size=70),
    st.integers(1, 3),
)
def test_lossy_codecs_stay_within_their_error_for_any_numbers(name: str, head: list[float], num_heads: int) -> None:
    values = np.array([head] * num_heads, np.float32)
    values *= (2.0 ** -np.arange(num_heads, dtype=np.float32)).reshape(-1, 1)
    allowed = np.abs(values).max(axis=1, keepdims=True) * (make_codec(name).error_share + 2**-22)
    tiny = np.finfo(np.float32).tiny
    assert (np.abs(through(name, values) - values) <= allowed + tiny).all()


@settings(deadline=None)
@given(st.sampled_from(CODECS), st.binary(max_size=200), st.integers(0, 300))
def test_garbage_is_refused(name: str, data: bytes, num_bytes: int) -> None:
    with pytest.raises(CodecError):
        decoded_by(make_codec(name), data, num_bytes)


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 0.72), ("float32", 0.88)])
def test_byte_planes_make_numbers_compress(dtype: Dtype, most: float) -> None:
    import zstandard

    values = normal(8, 32_768)
    without = len(zstandard.ZstdCompressor().compress(bytes_of(values, dtype))) / len(bytes_of(values, dtype))
    assert encoded_share("zstd", values, dtype) < min(most, without - 0.05)
    assert encoded_share("lz4", values, dtype) < 0.95, "lz4 finds nothing at all where planes are not apart"


@pytest.mark.parametrize(("name", "share"), [("fp8", 1 / 2), ("int8", 1 / 2), ("int4", 5 / 16)])
def test_lossy_codecs_take_the_share_they_are_there_for(name: str, share: float) -> None:
    values = normal(8, 8192)
    assert encoded_share(name, values, "bfloat16") == pytest.approx(share, abs=0.001)
    assert encoded_share(name, values, "float32") == pytest.approx(share / 2, abs=0.001)


@pytest.mark.parametrize("name", LOSSY)
def test_a_quiet_head_beside_a_loud_one_keeps_its_numbers(name: str) -> None:
    values = normal(2, 256) * np.array([[1e-4], [1e4]], np.float32)
    error = np.abs(through(name, values) - values).max(axis=1)
    assert (error <= 0.07 * np.abs(values).max(axis=1)).all()


def test_what_all_keys_of_a_channel_have_in_common_costs_int4_nothing() -> None:
    channels = np.repeat(np.linspace(-40, 40, 64, dtype=np.float32), RUN_ELEMENTS)
    values = (channels + normal(channels.size)).reshape(1, -1)
    assert np.abs(through("int4", values) - values).max() < 0.5


def test_fp8_has_the_values_of_e4m3_and_takes_the_nearest() -> None:
    known = {0x01: 2**-9, 0x08: 2**-6, 0x38: 1.0, 0x3C: 1.5, 0x7E: 448.0, 0xB8: -1.0}
    codes = np.concatenate(([0x7E], EIGHTH_BITS, list(known)))  # the largest first: a scale of one
    values = e4m3(codes).reshape(1, -1)
    assert values[0, -len(known) :].tolist() == list(known.values())
    assert through("fp8", values).tolist() == values.tolist(), "what fp8 can say is said exactly"
    steps = np.sort(e4m3(EIGHTH_BITS[:0x7F]))
    near = steps[:-1] + np.diff(steps) * np.float32(0.49), steps[:-1] + np.diff(steps) * np.float32(0.51)
    for numbers, nearest in zip(near, (steps[:-1], steps[1:]), strict=True):
        with_scale = np.concatenate(([np.float32(448)], numbers)).reshape(1, -1)
        assert through("fp8", with_scale)[0, 1:].tolist() == nearest.tolist()


def e4m3(codes: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Floats:
    """From the format's definition, one by one."""
    values = []
    for code in codes.tolist():
        exponent, fraction = code >> 3 & 15, code & 7
        magnitude = fraction / 8 * 2**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
        values.append(-magnitude if code & 128 else magnitude)
    return np.array(values, np.float32)


@pytest.mark.parametrize("name", LOSSY)
def test_float16_never_overflows_on_its_way_back(name: str) -> None:
    values = np.full((1, 64), 65504, np.float32)
    values[0, ::2] = -65504
    assert np.isfinite(through(name, values, "float16")).all()


@pytest.mark.parametrize("name", LOSSY)
def test_a_shape_that_does_not_fit_the_block_is_refused(name: str) -> None:
    block = bytes_of(normal(3, 32))
    for shape in (BlockShape("float32", 2, 32), BlockShape("float32", 1, 31), BlockShape("bfloat16", 5, 32)):
        with pytest.raises(CodecError, match="none of"):
            make_codec(name).encode(memoryview(block), shape)


@pytest.mark.parametrize("with_size", [True, False])
def test_a_frame_that_would_grow_beyond_the_block_is_refused_before_it_does(with_size: bool) -> None:
    import zstandard

    num_bytes = 64 << 20
    bomb = zstandard.ZstdCompressor(write_content_size=with_size).compress(bytes(num_bytes))
    data = framed(Header(make_codec("zstd").code, None, 1000), bomb)
    tracemalloc.start()
    try:
        with pytest.raises(CodecError, match="no block of 1000"):
            decoded_by(make_codec("zstd"), data, 1000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_block_is_refused_by_a_later_format() -> None:
    data = bytearray(make_codec("raw").encode(memoryview(b"block"), None))
    data[8] += 1
    with pytest.raises(CodecError, match="format 2 is not read by format 1"):
        decoded_by(make_codec("raw"), bytes(data), 5)
    assert len(data) == HEADER_BYTES + 5


@pytest.mark.parametrize(("name", "library"), [("zstd", "zstandard"), ("lz4", "lz4.block")])
def test_a_missing_library_is_said_with_its_remedy(name: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=rf"codec={name} needs a library .*{library}.*pip install"):
        make_codec(name)
    assert make_codec("int8").name == "int8", "the others go on"


def test_an_unknown_codec_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="unknown codec 'gzip'; known: raw, zstd, lz4, fp8, int8, int4"):
        make_codec("gzip")


def test_a_size_that_two_shapes_share_has_none() -> None:
    shapes = KnownShapes()
    half, brain = BlockShape("float16", 2, 64), BlockShape("bfloat16", 2, 64)
    shapes.add(1024, half)
    shapes.add(1024, half)
    shapes.add(2048, brain)
    shapes.add(4096, None)
    assert [shapes.of(size) for size in (1024, 2048, 4096, 8192)] == [half, brain, None, None]
    shapes.add(1024, brain)
    shapes.add(2048, None)
    shapes.add(4096, half)
    shapes.add(1024, half)
    assert [shapes.of(size) for size in (1024, 2048, 4096)] == [None, None, None]
