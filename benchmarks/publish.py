"""What every results file has: when, on which machine, under which name, and everything raw beside it."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from pathlib import Path

import msgspec

from benchmarks.machine import Machine
from core.clock import Clock


def date_of(clock: Clock) -> str:
    """Now, to the minute, in UTC."""
    return datetime.datetime.fromtimestamp(clock.unix_s(), datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def versions(machine: Machine, date: str) -> str:
    """One line: the machine, what runs on it, and when."""
    return (
        f"{machine.cpu}, {machine.num_cores} cores, {machine.memory_bytes / 2**30:.0f} GiB, last-level cache "
        f"{machine.cache_bytes / 2**20:.0f} MiB; Linux {machine.kernel}; Python {machine.python}, "
        f"torch {machine.torch}, vLLM {machine.vllm}, Baton {machine.baton}; {date}"
    )


def results_path(theme: str, machine: Machine, date: str, folder_or_file: Path) -> Path:
    """In a folder the name is made; a file is taken as it is."""
    if folder_or_file.is_dir():
        return folder_or_file / f"{theme}_{machine.hardware}_{date[:10]}.md"
    return folder_or_file


def write_raw(result: msgspec.Struct, path: Path | None) -> None:
    """Everything that was measured, as JSON; says where."""
    if path is not None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
        print(f"everything raw: {path}")


def bullets(lines: Iterable[str]) -> str:
    """As Markdown."""
    return "\n".join(f"* {line}" for line in lines)
