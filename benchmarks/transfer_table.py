"""The tables of `baton bench transfer`, as text and as Markdown, and the lines below them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from benchmarks.kv_models import KV_MODELS
from benchmarks.transfer_plan import KV_BYTES_PER_S, Cell
from benchmarks.transfer_results import Absence, Row, Run
from benchmarks.transfer_summary import FEWEST_FOR_P99

HEADER = (
    "system",
    "p50, ms",
    "p90",
    "p99",
    "min - max",
    "GB/s",
    "CPU-s/GB",
    "of memcpy",
    "in writes, ms",
    "samples",
)


def text_tables(rows: Sequence[Row]) -> str:
    """A table for each payload."""
    grid = [cells(row) for row in rows]
    widths = [max(len(line[at]) for line in (HEADER, *grid)) for at in range(len(HEADER))]
    lines: list[str] = []
    for cell, group in _grouped(rows):
        lines += ["", title(cell), _aligned(HEADER, widths), *(_aligned(cells(row), widths) for row in group)]
    return "\n".join(lines[1:])


def markdown_tables(rows: Sequence[Row]) -> str:
    """A section for each model, way and number of pairs."""
    lines: list[str] = []
    last = ""
    for cell, group in _grouped(rows):
        if heading(cell) != last:
            last = heading(cell)
            lines += ["", f"### {last}", "", f"| payload | {' | '.join(HEADER)} |", "|" + "---|" * (len(HEADER) + 1)]
        for index, row in enumerate(group):
            lines.append(f"| {payload(cell) if index == 0 else ''} | {' | '.join(cells(row))} |")
    return "\n".join(lines[1:])


def cells(row: Row) -> list[str]:
    """In the order of HEADER."""
    return [
        row.system,
        _ms(row.p50_s),
        _ms(row.p90_s),
        "-" if row.p99_s is None else _ms(row.p99_s),
        f"{_ms(row.min_s)} - {_ms(row.max_s)}",
        "-" if row.gb_per_s is None else f"{row.gb_per_s:.2f}",
        f"{row.cpu_s_per_gb:.2f}",
        "-" if row.of_memcpy is None else f"{row.of_memcpy:.2f}",
        _ms(row.held_s),
        str(row.num_samples),
    ]


def title(cell: Cell) -> str:
    """What is moved, and how."""
    return f"{heading(cell)}: {payload(cell)}"


def heading(cell: Cell) -> str:
    """The model, the way, and how many at once."""
    how = "all layers at once" if cell.grain == "end" else "layer by layer, from the last layer"
    return f"{cell.model}, {how}" + (f", {cell.num_pairs} pairs at the same time" if cell.num_pairs > 1 else "")


def payload(cell: Cell) -> str:
    """Blocks and bytes."""
    what = f"{cell.num_blocks:,} block{'s' if cell.num_blocks > 1 else ''}" if cell.num_blocks else "1 block of 1 layer"
    size = f"{cell.num_bytes / 1e6:,.1f} MB" if cell.num_bytes >= 1e6 else f"{cell.num_bytes / 1e3:,.1f} kB"
    return f"{what}, {size}"


def model_lines(run: Run) -> list[str]:
    """What the names mean."""
    names = dict.fromkeys(sample.cell.model for sample in run.samples)
    lines = []
    for model in (KV_MODELS[name] for name in names):
        size = run.sweep.block_size
        lines.append(
            f"{model.name}: {model.like}, {model.token_bytes / 1e3:,.1f} kB of KV per token in bfloat16; a block of "
            f"{size} tokens is {model.num_layers} pieces of {model.piece_bytes(size) / 1024:,.0f} KiB"
        )
    return lines


def absence_lines(absences: Iterable[Absence]) -> list[str]:
    """Who is missing, and why."""
    return [
        f"not measured: {absence.system}{f' with {absence.model}' if absence.model else ''}: {absence.why}"
        for absence in absences
    ]


def explanation() -> list[str]:
    """What the columns mean."""
    return [
        "p50, p90, p99: from the moment when the last byte was there to be written until the receiver has seen that "
        f"everything is in place; p99 of {FEWEST_FOR_P99} samples or more. For memcpy and Mooncake, whose receivers "
        "are told nothing, until the sender's call returned. GB/s: by the median. CPU-s/GB: of sender and receiver "
        "together, all threads, during the transfer; spinning counts. In writes: how long the calls held the "
        "sender's thread up.",
        f"layer by layer: a layer takes as long as if KV were computed at {KV_BYTES_PER_S / 1e9:.1f} GB/s, the "
        "sender's thread sleeping meanwhile; it is written when it is there. Time counts from the last layer.",
    ]


def _grouped(rows: Sequence[Row]) -> Iterator[tuple[Cell, list[Row]]]:
    for cell in dict.fromkeys(row.cell for row in rows):
        yield cell, [row for row in rows if row.cell == cell]


def _aligned(texts: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        text.ljust(width) if at == 0 else text.rjust(width)
        for at, (text, width) in enumerate(zip(texts, widths, strict=True))
    )
    return "  ".join(["  " + first, *rest]).rstrip()


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}" if seconds < 0.01 else f"{seconds * 1e3:,.1f}"
