"""`baton bench cache`: Baton's KV cache beside vLLM's own prefix cache and LMCache, tier by tier and under workloads.

start a system ──▶ ask it ──▶ its cells go into the state file ──▶ stop it ──▶ the next ... ──▶ tables, verdict, picture
"""

from __future__ import annotations

import shlex
import sys

from benchmarks import cores, part_lookup, part_overhead, part_survive, part_tiers, part_workloads
from benchmarks.bar import Bar
from benchmarks.bench import Bench
from benchmarks.cache_findings import findings_of
from benchmarks.cache_options import CacheOptions, parse
from benchmarks.cache_report import file_name, markdown, picture_of
from benchmarks.cache_results import CacheRun, Cell, Header, LookupCell, State
from benchmarks.cache_systems import SYSTEMS
from benchmarks.cache_table import problem_lines, setting_lines, tables_of
from benchmarks.corpus import Corpus, read_corpus
from benchmarks.machine import Machine, has_fast_bfloat16, read_cpuinfo, this_machine
from benchmarks.publish import date_of, write_raw
from benchmarks.site import site_of
from benchmarks.table import finding_lines
from cluster.progress import Progress
from cluster.zygote import Zygote
from core.clock import SystemClock

_PARTS = {
    "tiers": part_tiers,
    "workloads": part_workloads,
    "overhead": part_overhead,
    "lookup": part_lookup,
    "survive": part_survive,
}


def run(argv: list[str], zygote: Zygote | None = None) -> int:
    """0 when it was measured, whatever the figures say; 1 when a sample was not what it claims to be.

    zygote: a preloaded process to share; it is left running.
    """
    options = parse(argv, has_fast_bfloat16(read_cpuinfo()))
    machine = this_machine()
    result = _measured(options, shlex.join(["baton", "bench", "cache", *argv]), machine, zygote)
    _print(result)
    write_raw(result, options.out)
    if options.markdown is not None:
        path = file_name(result, options.markdown)
        picture = path.with_suffix(".svg")
        picture.write_text(picture_of(result))
        path.write_text(markdown(result, picture.name, part_workloads.engine_tokens()))
        print(f"results file: {path}, picture: {picture}")
    return 1 if problem_lines(result) else 0


def _print(result: CacheRun) -> None:
    for table in tables_of(result):
        print(f"\n{table.text()}")
    lines = [*setting_lines(result, result.header.text), *problem_lines(result)]
    lines += [f"note: {text}" for text in result.machine.warnings()]
    print("\n" + "\n".join(lines))
    print("\n" + "\n".join(finding_lines(findings_of(result))))


def _measured(options: CacheOptions, command: str, machine: Machine, zygote: Zygote | None) -> CacheRun:
    clock = SystemClock()
    date = date_of(clock)
    corpus = read_corpus(options.data)
    header = _header(options, machine, corpus)
    state = State(options.state, header)
    with site_of(options.recipe, Progress(sys.stderr), options.lmcache, zygote) as site:
        bar = Bar(sys.stderr, clock, 0.0)
        bench = Bench(options, site, state, bar, clock, machine, corpus)
        parts = [_PARTS[name] for name in options.parts]
        bar.expect(sum(part.weight(bench) for part in parts))
        try:
            for part in parts:
                part.measure(bench)
        finally:
            bar.close()
    core, _ = cores.pair()
    return CacheRun(command, date, machine, header, (core,), _in_order(state))


def _in_order(state: State) -> tuple[Cell, ...]:
    """As the systems are listed, whenever each was measured."""
    names = list(SYSTEMS)
    cells = state.cells.values()
    return tuple(sorted(cells, key=lambda cell: -1 if isinstance(cell, LookupCell) else names.index(cell.system)))


def _header(options: CacheOptions, machine: Machine, corpus: Corpus) -> Header:
    return Header(
        recipe=options.recipe,
        prompt_tokens=options.prompt_tokens,
        repeats=options.repeats,
        requests=options.requests,
        pairs=options.pairs,
        text=corpus.source,
        hardware=machine.hardware,
        vllm=machine.vllm,
    )
