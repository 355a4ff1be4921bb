"""The codecs' tables, as text and as a results file."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import msgspec

from benchmarks.machine import Machine
from benchmarks.publish import results_path
from benchmarks.quality import GREEDY_TOKENS, PREFIX_TOKENS, READ_TOKENS, Quality

_SPEED_HEADER = ("codec", "dtype", "bytes left", "encode, GB/s", "decode, GB/s")
_QUALITY_HEADER = (
    "codec",
    "dtype",
    "bits per byte",
    "change",
    "same likeliest token",
    f"same of {GREEDY_TOKENS} greedy tokens",
    "all of them same",
)
_HOW = f"""\
The text's last tenth, which the bundled model was not trained on, is cut into windows of {PREFIX_TOKENS + READ_TOKENS}
tokens. The model (transformers, float32) computes the KV of the first {PREFIX_TOKENS}; it is rounded to the dtype and
laid in two blocks of 128 tokens as vLLM's CPU attention lays them. *Bytes left* and speeds are of 64 such blocks,
headers and seals included, one thread, median of three passes; GB/s count the block's own bytes. *No planes* is the
library on the block as it is. *Quality*: the {READ_TOKENS} tokens that follow are predicted with the KV that came back,
and {GREEDY_TOKENS} tokens are chosen greedily from there; all are compared with exact KV of the same dtype. *All zeros*
is a prefix that was lost: what there is to lose."""


class SpeedRow(msgspec.Struct, frozen=True):
    """share: encoded bytes by a block's own."""

    name: str
    dtype: str
    share: float
    encode_gb_per_s: float
    decode_gb_per_s: float


class QualityRow(msgspec.Struct, frozen=True):
    """One codec's quality for one dtype."""

    name: str
    dtype: str
    quality: Quality


class CodecRun(msgspec.Struct, frozen=True):
    """Everything that was measured."""

    command: str
    date: str
    machine: Machine
    num_windows: int
    speeds: tuple[SpeedRow, ...]
    qualities: tuple[QualityRow, ...]


def text_tables(run: CodecRun) -> str:
    """For a terminal."""
    return "\n\n".join(_aligned(header, cells) for header, cells in _tables(run))


def markdown(run: CodecRun) -> str:
    """The whole file."""
    machine = run.machine
    versions = (
        f"{machine.cpu}, {machine.num_cores} cores; Linux {machine.kernel}; Python {machine.python}, "
        f"torch {machine.torch}, numpy {metadata.version('numpy')}, zstandard {metadata.version('zstandard')}, "
        f"lz4 {metadata.version('lz4')}, Baton {machine.baton}; {run.date}"
    )
    speeds, qualities = (_markdown_table(header, cells) for header, cells in _tables(run))
    sections = [
        "# Codecs: size, speed and quality on the bundled model's KV",
        f"```\n{run.command}\n```",
        versions,
        speeds,
        f"Quality over {run.num_windows} windows:",
        qualities,
        *([f"* note: {text}" for text in machine.warnings()]),
        "## How it is measured",
        _HOW,
    ]
    return "\n\n".join(sections) + "\n"


def file_name(run: CodecRun, folder_or_file: Path) -> Path:
    """See results_path."""
    return results_path("codecs", run.machine, run.date, folder_or_file)


def _tables(run: CodecRun) -> list[tuple[tuple[str, ...], list[list[str]]]]:
    exact = {row.dtype: row.quality.bits_per_byte for row in run.qualities if row.name == "exact"}
    speeds = [
        [row.name, row.dtype, f"{row.share:.3f}", f"{row.encode_gb_per_s:.2f}", f"{row.decode_gb_per_s:.2f}"]
        for row in run.speeds
    ]
    qualities = [
        [
            row.name,
            row.dtype,
            f"{row.quality.bits_per_byte:.5f}",
            f"{row.quality.bits_per_byte - exact[row.dtype]:+.5f}",
            f"{row.quality.same_choices:.2%}",
            f"{row.quality.same_greedy:.1%}",
            f"{row.quality.same_answers:.1%}",
        ]
        for row in run.qualities
    ]
    return [(_SPEED_HEADER, speeds), (_QUALITY_HEADER, qualities)]


def _aligned(header: Sequence[str], grid: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[at]) for line in (header, *grid)) for at in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in (header, *grid)]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _markdown_table(header: Sequence[str], grid: Sequence[Sequence[str]]) -> str:
    rows = [f"| {' | '.join(line)} |" for line in (header, *grid)]
    return "\n".join([rows[0], "|" + "---|" * len(header), *rows[1:]])
