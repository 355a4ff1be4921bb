"""The results file of `baton bench transfer`, and its picture: latency and bandwidth against size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks import curves
from benchmarks.publish import bullets, results_path, versions
from benchmarks.summary import Finding
from benchmarks.table import finding_lines
from benchmarks.transfer_results import Row, Run, Table
from benchmarks.transfer_summary import findings_of, rows_of
from benchmarks.transfer_table import absence_lines, explanation, markdown_tables, model_lines

_HOW = """\
Every system has a sender and a receiver in processes of their own, which sleep (SIGSTOP) while another is measured;
systems take turns, beginning with another one each time, so that noise hits all alike. A turn is a transfer of four
blocks at most that is not timed, so that code is warm, and one that is; ten of payloads under 8 MB. All move pieces
(one block of one layer) between the same two memories with block numbers in random order on both sides, handed out so
that no block comes back before every other one was used: none is in the processor's caches (the size of the last-level
cache stands above; a cloud's guest has a share of it). The first job of each payload is not timed: its target is
emptied before, and a digest over every byte compared after. Peers exchange nothing but block numbers and one word when
all is there; Baton's transports check every block list, and over zmq digest every byte that arrives.

* memcpy: one thread copies piece by piece; no peer. It is the yardstick, and not a transport.
* nixl-raw: NIXL's UCX back end as it comes; prepared descriptors, one transfer per write, a notification. nixl-tuned:
  the fastest set-up found on CPUs (UCX_TLS=posix,self, no error handling).
* ucxx-raw, pyzmq-raw: pieces of one layer gathered into frames of 1 MiB at most, sent, scattered into place, as Baton's
  transports do. tcp-raw: one socket, pieces gathered and scattered by the kernel.
* mooncake: its transfer engine over TCP, synchronous batches of at most 1,024 pieces."""


def markdown(run: Run, picture: str = "") -> str:
    """The whole file."""
    rows = rows_of(run)
    peers = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    sections = [
        "# Transfer: KV blocks from one process to another, beside a memcpy and peers",
        f"```\n{run.command}\n```",
        f"{versions(run.machine, run.date)}; {peers}",
        bullets([*model_lines(run), *absence_lines(run.absences), *run.notes]),
        f"![latency and bandwidth against size]({picture})" if picture else "",
        "## What it means",
        bullets(finding_lines(findings_of(rows))),
        "## Figures",
        markdown_tables(rows),
        "## How it is measured",
        _HOW,
        bullets(explanation()),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def table_of(run: Run) -> bytes:
    """What the figures are drawn from, as JSON, a row per line."""
    table = Table(run.command, run.date, run.machine, run.versions, tuple(rows_of(run)))
    return msgspec.json.encode(table).replace(b'{"system"', b'\n{"system"') + b"\n"


def picture_of(run: Run) -> str:
    """One row of panels for each model: one pair, all layers at once."""
    rows = [row for row in rows_of(run) if row.cell.grain == "end" and row.cell.num_pairs == 1]
    panels = []
    for model in dict.fromkeys(row.cell.model for row in rows):
        of_model = [row for row in rows if row.cell.model == model]
        panels.append(
            (
                curves.Panel(f"{model}: median latency", "MB", "ms", _lines(of_model, is_rate=False)),
                curves.Panel(f"{model}: bandwidth", "MB", "GB/s", _lines(of_model, is_rate=True)),
            )
        )
    return curves.svg("KV blocks from one process to another", panels)


def file_name(run: Run, folder_or_file: Path) -> Path:
    """See results_path."""
    return results_path("transfer", run.machine, run.date, folder_or_file)


def findings(run: Run) -> list[Finding]:
    """Targets and what became of them."""
    return findings_of(rows_of(run))


def _lines(rows: Sequence[Row], *, is_rate: bool) -> tuple[curves.Line, ...]:
    lines = []
    for name in dict.fromkeys(row.system for row in rows):
        of_system = [row for row in rows if row.system == name]
        points = [
            (row.cell.num_bytes / 1e6, (row.gb_per_s or 0.0) if is_rate else row.p50_s * 1e3) for row in of_system
        ]
        lines.append(curves.Line(name, tuple(point for point in points if point[1] > 0)))
    return tuple(lines)
