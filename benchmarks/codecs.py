"""`baton bench codecs`: size, speed and quality of each codec on the bundled model's own KV.

text ──▶ held-out tenth ──▶ model ──▶ KV in blocks ──▶ each codec: encode, decode ──▶ sizes, GB/s
                                                       each lossy one ──▶ bits per byte, tokens (benchmarks/quality)
"""

from __future__ import annotations

import argparse
import shlex
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import msgspec

from benchmarks.codec_report import CodecRun, QualityRow, SpeedRow, file_name, markdown, text_tables
from benchmarks.machine import this_machine
from benchmarks.publish import date_of
from benchmarks.quality import Blocks, DemoModel, quality
from cluster.bundled import BUNDLED_FOLDER
from core.clock import SystemClock
from core.errors import ConfigError
from kvcache.codecs import CODECS, LOSSY, make_codec
from kvcache.lossless import ZSTD_LEVEL
from kvcache.shape import BlockShape, Dtype

DTYPES: tuple[Dtype, ...] = ("bfloat16", "float32")
PASSES = 3
MOST_WINDOWS = 1000
QUICK_WINDOWS = 4
SPEED_BLOCKS = 64
HELD_OUT_SHARE = 0.1
"""As in the model's card: its end was not trained on."""

ZEROS = "all zeros"
"""In place of a codec: what the prefix is worth at all."""

Coder = tuple[Callable[[bytes], bytes], Callable[[bytes, bytearray], None]]


class CodecOptions(msgspec.Struct, frozen=True):
    """windows: at most so many of the text."""

    text: Path
    windows: int
    markdown: Path | None = None


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def run(argv: list[str]) -> int:
    """0 when it was measured, whatever the figures say."""
    options = parse(argv)
    text = options.text.read_text(encoding="utf-8")
    clock, machine = SystemClock(), this_machine()
    date = date_of(clock)
    model = DemoModel(BUNDLED_FOLDER)
    windows = model.windows(text[-int(HELD_OUT_SHARE * len(text)) :], options.windows)
    speeds: list[SpeedRow] = []
    qualities: list[QualityRow] = []
    for dtype in DTYPES:
        kind = model.kind(dtype)
        prefixes = model.prefix_blocks(windows, kind)
        blocks = [block for prefix in prefixes for block in prefix][:SPEED_BLOCKS]
        speeds += [_speed(name, dtype, blocks, coder) for name, coder in _coders(kind.shape).items()]
        exact, num_bytes = model.read(windows, prefixes, kind), model.num_bytes(windows)
        qualities.append(QualityRow("exact", dtype, quality(exact, exact, num_bytes)))
        for name in (*LOSSY, ZEROS):
            other = model.read(windows, _through(name, prefixes, kind.shape), kind)
            qualities.append(QualityRow(name, dtype, quality(exact, other, num_bytes)))
    result = CodecRun(
        command=shlex.join(["baton", "bench", "codecs", *argv]),
        date=date,
        machine=machine,
        num_windows=len(windows),
        speeds=tuple(speeds),
        qualities=tuple(qualities),
    )
    print(text_tables(result))
    if options.markdown is not None:
        path = file_name(result, options.markdown)
        path.write_text(markdown(result), encoding="utf-8")
        print(f"results file: {path}")
    return 0


def parse(argv: Sequence[str]) -> CodecOptions:
    """Raises ConfigError naming the option."""
    parser = _Parser("baton bench codecs", description="Size, speed and quality of codecs for KV.", allow_abbrev=False)
    parser.add_argument("--text", metavar="FILE", required=True, help="whose last tenth is read: tinyshakespeare")
    parser.add_argument("--markdown", metavar="FILE", help="a results file; in a folder: [theme]_[hardware]_[date].md")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_WINDOWS} windows of the text instead of all")
    given = parser.parse_args(argv)
    text = Path(given.text)
    if not text.is_file():
        raise ConfigError(f"--text {given.text}: no such file")
    target = Path(given.markdown) if given.markdown else None
    if target is not None and not target.absolute().parent.is_dir():
        raise ConfigError(f"--markdown {given.markdown}: no such folder")
    return CodecOptions(text, QUICK_WINDOWS if given.quick else MOST_WINDOWS, target)


def _coders(shape: BlockShape) -> dict[str, Coder]:
    """Every codec, and the libraries on blocks as they are."""
    import lz4.block
    import zstandard

    coders: dict[str, Coder] = {name: _coder(name, shape) for name in CODECS}
    packer, unpacker = zstandard.ZstdCompressor(level=ZSTD_LEVEL), zstandard.ZstdDecompressor()

    def zstd_back(data: bytes, into: bytearray) -> None:
        into[:] = unpacker.decompress(data)

    def lz4_back(data: bytes, into: bytearray) -> None:
        into[:] = lz4.block.decompress(data, uncompressed_size=len(into))

    coders["zstd, no planes"] = packer.compress, zstd_back
    coders["lz4, no planes"] = lambda block: bytes(lz4.block.compress(block, store_size=False)), lz4_back
    return coders


def _coder(name: str, shape: BlockShape) -> Coder:
    codec = make_codec(name)
    return (
        lambda block: codec.encode(memoryview(block), shape),
        lambda data, into: codec.decode(memoryview(data), memoryview(into)),
    )


def _speed(name: str, dtype: Dtype, blocks: Blocks, coder: Coder) -> SpeedRow:
    """Medians of a few passes over all blocks, one thread; the first pass is not counted."""
    encode, decode = coder
    clock, into = SystemClock(), bytearray(len(blocks[0]))
    encode_s, decode_s, encoded = [], [], list[bytes]()
    for _ in range(PASSES + 1):
        begun_s = clock.monotonic_s()
        encoded = [encode(block) for block in blocks]
        encode_s.append(clock.monotonic_s() - begun_s)
        begun_s = clock.monotonic_s()
        for data in encoded:
            decode(data, into)
        decode_s.append(clock.monotonic_s() - begun_s)
    num_bytes = sum(map(len, blocks))
    return SpeedRow(
        name=name,
        dtype=dtype,
        share=sum(map(len, encoded)) / num_bytes,
        encode_gb_per_s=num_bytes / statistics.median(encode_s[1:]) / 1e9,
        decode_gb_per_s=num_bytes / statistics.median(decode_s[1:]) / 1e9,
    )


def _through(name: str, prefixes: Sequence[Blocks], shape: BlockShape) -> list[Blocks]:
    """What comes back of every block."""
    if name == ZEROS:
        return [[bytes(len(block)) for block in blocks] for blocks in prefixes]
    encode, decode = _coder(name, shape)
    result: list[Blocks] = []
    for blocks in prefixes:
        result.append([])
        for block in blocks:
            into = bytearray(len(block))
            decode(encode(block), into)
            result[-1].append(bytes(into))
    return result
