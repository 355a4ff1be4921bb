"""`baton bench cache`: Baton's KV cache beside vLLM's own prefix cache and LMCache, tier by tier and under workloads.

start one system ──▶ ask it ──▶ its cell goes into the state file ──▶ stop it ──▶ the next ... ──▶ tables, verdict, picture
"""

from __future__ import annotations

import datetime
import shlex
import sys

import msgspec

from benchmarks import cores, part_tiers
from benchmarks.bar import Bar
from benchmarks.bench import Bench
from benchmarks.cache_options import CacheOptions, parse
from benchmarks.cache_results import CacheRun, Header, State
from benchmarks.cache_systems import site_of
from benchmarks.machine import Machine, has_fast_bfloat16, read_cpuinfo, this_machine
from cluster.progress import Progress
from core.clock import SystemClock

_PARTS = {"tiers": part_tiers}


def run(argv: list[str]) -> int:
    """0 when it was measured, whatever the figures say; 1 when a sample was not what it claims to be."""
    options = parse(argv, has_fast_bfloat16(read_cpuinfo()))
    machine = this_machine()
    result = _measured(options, shlex.join(["baton", "bench", "cache", *argv]), machine)
    if options.out is not None:
        options.out.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
        print(f"everything raw: {options.out}")
    return 0


def _measured(options: CacheOptions, command: str, machine: Machine) -> CacheRun:
    clock = SystemClock()
    date = datetime.datetime.fromtimestamp(clock.unix_s(), datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    header = _header(options, machine)
    state = State(options.state, header)
    with site_of(options.recipe, Progress(sys.stderr), options.lmcache) as site:
        bar = Bar(sys.stderr, clock, 0.0)
        bench = Bench(options, site, state, bar, clock, machine)
        parts = [_PARTS[name] for name in options.parts]
        bar.expect(sum(part.weight(bench) for part in parts))
        try:
            for part in parts:
                part.measure(bench)
        finally:
            bar.close()
    core, _ = cores.pair()
    return CacheRun(command, date, machine, header, (core,), tuple(state.cells.values()))


def _header(options: CacheOptions, machine: Machine) -> Header:
    return Header(
        recipe=options.recipe,
        prompt_tokens=options.prompt_tokens,
        repeats=options.repeats,
        requests=options.requests,
        pairs=options.pairs,
        text=str(options.data or ""),
        hardware=machine.hardware,
        vllm=machine.vllm,
    )
