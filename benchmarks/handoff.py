"""`baton bench handoff`: the first token of 1P1D beside plain vLLM's, and the hand-off beside a memcpy.

start all systems ──▶ warm up ──▶ for each length, for each repeat: memcpy, then every system ──▶ table, verdict
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager

from benchmarks import cores, table
from benchmarks.bar import Bar
from benchmarks.machine import Machine, has_fast_bfloat16, read_cpuinfo, this_machine
from benchmarks.measure import Measurement, Plan, Yard
from benchmarks.memcpy import CacheShape, Yardstick
from benchmarks.options import HandoffOptions, parse
from benchmarks.publish import date_of, write_raw
from benchmarks.report import file_name, markdown, problem_lines
from benchmarks.results import Run
from benchmarks.summary import findings_of, rows_of
from benchmarks.systems import cores_of, running
from cluster.bundled import BUNDLED_FOLDER
from cluster.launcher import Cluster
from cluster.members import get
from cluster.progress import Progress
from cluster.zygote import Zygote
from core.clock import Clock, SystemClock
from core.errors import BatonError

DEFAULT_BLOCK_SIZE = 128


def run(argv: list[str], zygote: Zygote | None = None) -> int:
    """0 when it was measured, whatever the figures say; 1 when a sample was not what it claims to be.

    zygote: a preloaded process to share; it is left running.
    """
    options = parse(argv, has_fast_bfloat16(read_cpuinfo()))
    machine = this_machine()
    started = running(options.systems, options.recipe, Progress(sys.stderr), zygote)
    result = measured(options, shlex.join(["baton", "bench", "handoff", *argv]), machine, started)
    show(result)
    write_raw(result, options.out)
    if options.markdown is not None:
        path = file_name(result, options.markdown)
        path.write_text(markdown(result))
        print(f"results file: {path}")
    return 1 if any(sample.problem for sample in result.samples) else 0


def measured(
    options: HandoffOptions, command: str, machine: Machine, started: AbstractContextManager[dict[str, Cluster]]
) -> Run:
    """Everything that it starts is stopped again, whatever ends it."""
    clock = SystemClock()
    date = date_of(clock)
    with started as clusters:
        urls = {name: cluster.url for name, cluster in clusters.items()}
        plan = Plan(options.systems, urls, options.prompts, options.repeats, _vocabulary())
        block_size = _block_size(urls)
        bar = Bar(sys.stderr, clock, plan.weight())
        measurement = Measurement(plan, clock, bar)
        try:
            measurement.warm_up()
            with _yard(options, machine, block_size, clock) as yard:
                measurement.measure(yard)
        except BatonError as error:
            raise BatonError(f"{error}\n{_last_words(clusters)}".rstrip()) from error
        finally:
            bar.close()
        used_cores = cores_of(clusters)
    samples, copies = tuple(measurement.samples), tuple(measurement.copies)
    return Run(command, date, machine, options.recipe, used_cores, block_size, samples, copies)


@contextmanager
def _yard(options: HandoffOptions, machine: Machine, block_size: int, clock: Clock) -> Iterator[Yard | None]:
    """Memories like the KV caches; none where nothing is handed over."""
    if not any(system.transport for system in options.systems):
        yield None
        return
    recipe = options.recipe
    num_layers = recipe.shape.num_layers
    block_bytes = recipe.token_bytes // num_layers * block_size
    shape = CacheShape(num_layers, block_bytes, recipe.kv_cache_bytes // (num_layers * block_bytes))
    core, _ = cores.pair()
    with closing(Yardstick(shape, clock, machine.cache_bytes)) as yardstick:
        yield Yard(yardstick, core, block_size, recipe.max_num_batched_tokens)


def show(result: Run) -> None:
    rows = rows_of(result)
    print()
    print(table.text_table(rows))
    lines = [*table.memcpy_lines(result), *table.window_lines(rows), *table.part_lines(rows)]
    lines += [*table.setting_lines(result), *problem_lines(result)]
    lines += [f"note: {text}" for text in result.machine.warnings()]
    print("\n" + "\n".join(lines))
    findings = table.finding_lines(findings_of(rows))
    if findings:
        print("\n" + "\n".join(findings))


def _block_size(urls: Mapping[str, str]) -> int:
    """As the instances that hand over told their proxy; vLLM's default on CPUs where none does."""
    for url in urls.values():
        status, body = get(f"{url}/instances")
        listing = json.loads(body)["instances"] if status == 200 else []
        sizes = [entry["block_size"] for entry in listing if entry.get("block_size")]
        if sizes:
            return int(sizes[0])
    return DEFAULT_BLOCK_SIZE


def _vocabulary() -> int:
    return int(json.loads((BUNDLED_FOLDER / "config.json").read_text())["vocab_size"])


def _last_words(clusters: Mapping[str, Cluster]) -> str:
    members = [member for cluster in clusters.values() for member in cluster.members]
    return "\n".join(member.last_words() for member in members if member.exit_code() is not None)
