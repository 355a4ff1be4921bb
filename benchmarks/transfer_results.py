"""What a run of `baton bench transfer` leaves: every sample raw. The JSON of `--out` is this, as it is."""

from __future__ import annotations

import msgspec

from benchmarks.machine import Machine
from benchmarks.transfer_plan import Cell, Sweep


class Sample(msgspec.Struct, frozen=True):
    """One job per pair at the same time. latencies_s: of each pair, from the last byte being there to be written until
    all was in place. window_s: from the first beginning to the last end. held_s: inside the calls that write, on
    average. cpu_s: of all processes."""

    system: str
    cell: Cell
    latencies_s: tuple[float, ...]
    window_s: float
    held_s: float
    cpu_s: float


class Absence(msgspec.Struct, frozen=True):
    """Who is missing from which model's rows (all, if none is named), and why."""

    system: str
    model: str
    why: str


class Row(msgspec.Struct, frozen=True):
    """One system at one cell. Seconds; p99_s only of enough samples; gb_per_s of all pairs together, None where the
    transfer hides behind the computation; of_memcpy: memcpy's p50 by this one's."""

    system: str
    cell: Cell
    num_samples: int
    p50_s: float
    p90_s: float
    p99_s: float | None
    min_s: float
    max_s: float
    held_s: float
    gb_per_s: float | None
    cpu_s_per_gb: float
    of_memcpy: float | None


class Table(msgspec.Struct, frozen=True):
    """What is kept beside a results file: a run without its samples."""

    command: str
    date: str
    machine: Machine
    versions: dict[str, str]
    rows: tuple[Row, ...]


class Run(msgspec.Struct, frozen=True):
    """One `baton bench transfer`. versions: of what was compared. notes: what the sweep left out, and doubts."""

    command: str
    date: str
    machine: Machine
    versions: dict[str, str]
    sweep: Sweep
    samples: tuple[Sample, ...]
    absences: tuple[Absence, ...]
    notes: tuple[str, ...]
