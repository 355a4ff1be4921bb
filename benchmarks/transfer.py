"""`baton bench transfer`: how long KV blocks take from one process to another, beside a memcpy and peers.

for each model ──▶ processes of all systems ──▶ for each payload: all by turns ──▶ tables, verdict, file, picture
`--inside`: a running 1P1D instead, over each transport (benchmarks/transfer_inside.py)
"""

from __future__ import annotations

import shlex
import sys
from contextlib import closing
from importlib import metadata

from benchmarks.bar import Bar
from benchmarks.machine import Machine, this_machine
from benchmarks.mover_mooncake import VERSION as MOONCAKE_VERSION
from benchmarks.publish import date_of, write_raw
from benchmarks.table import finding_lines
from benchmarks.transfer_measure import Measurement
from benchmarks.transfer_options import TransferOptions, parse
from benchmarks.transfer_plan import cells_of, left_out
from benchmarks.transfer_report import file_name, findings, markdown, picture_of, table_of
from benchmarks.transfer_results import Absence, Run
from benchmarks.transfer_summary import rows_of
from benchmarks.transfer_table import absence_lines, explanation, text_tables
from core.clock import SystemClock

_PACKAGES = ("pyzmq", "nixl", "ucxx-cu13", "ucxx-cu12", "ucxx")


def run(argv: list[str]) -> int:
    """0 when everything that runs here was measured, whatever the figures say; 1 when a system failed on the way."""
    options = parse(argv)
    command = shlex.join(["baton", "bench", "transfer", *argv])
    if options.inside:
        from benchmarks.transfer_inside import run_inside

        return run_inside(options, command)
    result = _measured(options, command)
    _print(result)
    write_raw(result, options.out)
    _publish(result, options)
    failed = {absence.system for absence in result.absences if absence.model}
    return 1 if failed else 0


def _measured(options: TransferOptions, command: str) -> Run:
    clock, machine, sweep = SystemClock(), this_machine(), options.sweep
    present = tuple(system for system in options.systems if not system.why_not)
    rounds = [
        (model, num_pairs)
        for num_pairs in sweep.pairs
        for model in (options.models if num_pairs == sweep.pairs[0] else options.models[:1])
    ]
    weights = [cell.weight * len(present) for each in rounds for cell in cells_of(each[0], sweep, each[1])]
    date = date_of(clock)
    with closing(Bar(sys.stderr, clock, sum(weights))) as bar:
        measurement = Measurement(bar, clock, sweep.seconds)
        for model, num_pairs in rounds:
            measurement.measure(model, sweep, num_pairs, present)
    missing = [Absence(system.name, "", system.why_not) for system in options.systems if system.why_not]
    notes = ["note: the time was up before everything was measured"] if measurement.is_cut_short else []
    notes += [line for model in options.models for line in left_out(model, sweep)]
    return Run(
        command=command,
        date=date,
        machine=machine,
        versions=_versions(options),
        sweep=sweep,
        samples=tuple(measurement.samples),
        absences=(*missing, *measurement.absences),
        notes=(*notes, *_doubts(machine, options)),
    )


def _print(result: Run) -> None:
    print()
    print(text_tables(rows_of(result)))
    print("\n" + "\n".join([*absence_lines(result.absences), *result.notes, *explanation()]))
    print("\n" + "\n".join(finding_lines(findings(result))))


def _publish(result: Run, options: TransferOptions) -> None:
    """The results file, and its picture and rows beside it."""
    path = file_name(result, options.markdown) if options.markdown is not None else None
    drawn = options.picture or (path.with_suffix(".svg") if path is not None else None)
    if drawn is not None:
        drawn.write_text(picture_of(result), encoding="utf-8")
        print(f"picture: {drawn}")
    if path is not None:
        path.write_text(markdown(result, drawn.name if drawn is not None else ""), encoding="utf-8")
        path.with_suffix(".json").write_bytes(table_of(result))
        print(f"results file: {path}, and its rows as JSON beside it")


def _doubts(machine: Machine, options: TransferOptions) -> list[str]:
    """Why the figures should not be believed too much."""
    doubts = [f"note: {text}" for text in machine.warnings()]
    if options.sweep.memory_bytes < machine.cache_bytes:
        doubts.append(
            f"note: a cache of {options.sweep.memory_bytes >> 20} MiB fits into the processor's "
            f"({machine.cache_bytes >> 20} MiB): blocks may have been warm"
        )
    return doubts


def _versions(options: TransferOptions) -> dict[str, str]:
    """Of what was compared."""
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if any(system.name == "mooncake" and not system.why_not for system in options.systems):
        found["mooncake-transfer-engine-non-cuda"] = MOONCAKE_VERSION
    return found
