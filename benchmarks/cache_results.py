"""What `baton bench cache` measures, cell by cell, and the file in which finished cells wait for the rest.

    state file:   header (what the run is) ⏎ cell ⏎ cell ⏎ ...          one JSON per line, appended when a cell is done

A cell is the smallest thing that is measured anew after an interruption: one system in one situation.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from benchmarks.machine import Machine
from benchmarks.systems import Recipe
from core.errors import ConfigError


class Answered(msgspec.Struct, frozen=True):
    """One request, one client. from_engine, from_outside: prompt tokens that the engine's own cache and whatever is
    behind it gave, by vLLM's counters; tiers: of the latter by tier, where the system tells it. load_ms, load_bytes: of
    the copies into the engine; waited_ms: for how long of it the request did not get on. problem: why it is not what it
    claims to be; empty if it is.
    """

    prompt_tokens: int
    first_token_ms: float
    done_ms: float
    gaps_ms: tuple[float, ...]
    from_engine: int = 0
    from_outside: int = 0
    tiers: dict[str, int] = {}
    load_ms: float = 0.0
    waited_ms: float = 0.0
    load_bytes: int = 0
    problem: str = ""

    @property
    def computed(self) -> int:
        """Prompt tokens that the engine computed."""
        return self.prompt_tokens - self.from_engine - self.from_outside


class Raw(msgspec.Struct, frozen=True):
    """The same bytes by the barest means: memcpy, disk, redis, peer. seconds: of each pass."""

    name: str
    num_bytes: int
    seconds: tuple[float, ...]


class TierCell(msgspec.Struct, frozen=True, tag="tiers"):
    """One system and prompt length: first computed, then found in its tier."""

    system: str
    prompt_tokens: int
    cold: tuple[Answered, ...]
    warm: tuple[Answered, ...]
    raws: tuple[Raw, ...]

    @property
    def key(self) -> str:
        return tier_key(self.system, self.prompt_tokens)


class WorkloadCell(msgspec.Struct, frozen=True, tag="workload"):
    """One system under one workload. reuse: the share of prompt tokens that was asked for; possible: what a cache
    without end could have given, in whole blocks. working_set_bytes: of KV of all distinct blocks. num_active: families
    that were asked by turns. problem: of the whole cell."""

    system: str
    workload: str
    reuse: int
    size: str
    possible: float
    working_set_bytes: int
    num_active: int
    answers: tuple[Answered, ...]
    problem: str = ""

    @property
    def key(self) -> str:
        return workload_key(self.system, self.workload, self.reuse, self.size)


class PairCell(msgspec.Struct, frozen=True, tag="overhead"):
    """A system beside vLLM with its own prefix cache, request by request in turns: milliseconds until the first token
    and until the end, without and with."""

    system: str
    situation: str
    first_token_ms: tuple[tuple[float, float], ...]
    done_ms: tuple[tuple[float, float], ...]
    problem: str = ""

    @property
    def key(self) -> str:
        return pair_key(self.system, self.situation)


class LookupCell(msgspec.Struct, frozen=True, tag="lookup"):
    """The arena by itself, from another process: one request's look-up, and a prompt's blocks in and out."""

    num_blocks: int
    block_bytes: int
    round_trips_us: tuple[float, ...]
    store_s: tuple[float, ...]
    load_s: tuple[float, ...]
    memcpy: Raw

    @property
    def key(self) -> str:
        return LOOKUP_KEY


class SurviveCell(msgspec.Struct, frozen=True, tag="survive"):
    """Prompts that an engine stored which was then killed, asked of the one in its place."""

    system: str
    answers: tuple[Answered, ...]

    @property
    def key(self) -> str:
        return survive_key(self.system)


Cell = TierCell | WorkloadCell | PairCell | LookupCell | SurviveCell
LOOKUP_KEY = "lookup"


def tier_key(system: str, prompt_tokens: int) -> str:
    return f"tiers/{system}/{prompt_tokens}"


def workload_key(system: str, workload: str, reuse: int, size: str) -> str:
    return f"workload/{system}/{workload}/{reuse}/{size}"


def pair_key(system: str, situation: str) -> str:
    return f"overhead/{system}/{situation}"


def survive_key(system: str) -> str:
    return f"survive/{system}"


class Header(msgspec.Struct, frozen=True):
    """What a run is, all but the moment: only equal runs share a state file."""

    recipe: Recipe
    prompt_tokens: int
    repeats: int
    requests: int
    pairs: int
    text: str
    hardware: str
    vllm: str


class CacheRun(msgspec.Struct, frozen=True):
    """One `baton bench cache`. The JSON of `--out` is this, as it is."""

    command: str
    date: str
    machine: Machine
    header: Header
    cores: tuple[int, ...]
    cells: tuple[Cell, ...]

    def of(self, kind: type[msgspec.Struct]) -> list[Cell]:
        """The cells of one part."""
        return [cell for cell in self.cells if isinstance(cell, kind)]


class State:
    """Finished cells, also those of an earlier, interrupted run. path None: nothing is kept."""

    def __init__(self, path: Path | None, header: Header) -> None:
        """Raises ConfigError if the file belongs to a run with other options."""
        self._path = path
        self.cells: dict[str, Cell] = {}
        if path is None:
            return
        if path.exists() and path.stat().st_size:
            self.cells = {cell.key: cell for cell in _read(path, header)}
        else:
            path.write_bytes(msgspec.json.encode(header) + b"\n")

    def has(self, key: str) -> bool:
        return key in self.cells

    def add(self, cell: Cell) -> None:
        """Keeps a finished cell."""
        self.cells[cell.key] = cell
        if self._path is not None:
            with self._path.open("ab") as file:
                file.write(msgspec.json.encode(cell) + b"\n")


def _read(path: Path, header: Header) -> Iterator[Cell]:
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    lines = whole.split(b"\n")
    try:
        found = msgspec.json.decode(lines[0], type=Header)
    except msgspec.DecodeError as error:
        raise ConfigError(f"--state {path} is not a state file of this benchmark: {error}") from error
    if found != header:
        raise ConfigError(f"--state {path} belongs to a run with {_differences(found, header)}: name another file")
    if whole != content:  # a last line that was cut off by a kill: its cell is measured again
        path.write_bytes(whole)
    for line in filter(None, lines[1:]):
        yield msgspec.json.decode(line, type=Cell)


def _differences(found: Header, wanted: Header) -> str:
    names = [name for name in Header.__struct_fields__ if getattr(found, name) != getattr(wanted, name)]
    return ", ".join(f"{name} {getattr(found, name)}" for name in names)
