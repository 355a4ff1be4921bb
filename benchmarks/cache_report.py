"""The results file of `baton bench cache` and its picture: `cache_[hardware]_[date].md` and `.svg`."""

from __future__ import annotations

from pathlib import Path

from benchmarks.cache_findings import findings_of
from benchmarks.cache_results import CacheRun
from benchmarks.cache_summary import tier_rows, workload_rows
from benchmarks.cache_table import problem_lines, setting_lines, tables_of
from benchmarks.picture import Group, Mark, svg
from benchmarks.publish import bullets, results_path, versions
from benchmarks.table import finding_lines

_HOW = """\
One system runs at a time (in the overhead's pairs: two), its engine alone on one core (under workloads `peer` has two
engines there), all behind the same proxy, asked by one client, one request after the other, with greedy float answers
of a few tokens. Times are the client's. What was found where is checked request by request by the engine's own
counters, for Baton also by tier; a sample that did not come from where its system claims to have it is listed as not
valid.

*Tiers*: random tokens, engines without their own prefix cache (`prefix` excepted), so that only the tier can have a
prompt. Whole blocks of 128 tokens can be found, of 4,000 tokens 3,968; Baton keeps a prompt's incomplete last block
too, so it computes one token of a prompt that is asked again where the others compute 32. *Found* in host memory:
asked again. Below it: Baton's engine and cache server are started anew and the tier alone is kept; LMCache's host
memory is emptied through its own endpoint. Everything lies in the kernel's page cache, as a tier that was just
written does. Where a load is part of the step that computes with it, the copy shares the memory with the forward pass
and takes longer than by itself; what the request waited for it stands beside. *Barest read* is a memcpy of the same
bytes for host memory; one read per block's file, one GET per block over one connection, one TCP stream over loopback
for the others.

*Workloads*: real text; reuse is what a cache without end would find in whole blocks. Every engine keeps its own
prefix cache and has room for {engine} tokens; `prefix-large` has the others' host memory on top, so the same total.
`small` working sets fit the engine's cache, `large` ones take two and a half times as much at a time. Answers of a
conversation are the text's own. *Shorter* compares p50 with the same requests without any prefix cache; p99 is given
for 100 requests or more.

`peer` under workloads is two hosts on this machine, each with an engine and an arena of its own, each the other's
peer over loopback. Requests go to them by turns, so a good half of what is reused was last asked of the other host;
both engines compute on the same core, one at a time. Each host has what the one host of `disk` and `redis` has: an
engine's cache, and an arena that holds less than `large` working sets (`host`'s holds far more), as with more each
host would soon have a copy of its own. Nothing lies below the two arenas, and what both hosts have used takes room in
both.

*LMCache* 0.5.6 in its server mode, with packages that its authors do not declare as a set (no CUDA): stores and loads
are its CPU fallback, synchronous in the worker's step. **These are not LMCache's figures on a GPU.** Its chunks have
the block size, 128 tokens; its memory was filled once before measuring. vLLM's own CPU offloading refuses the CPU
platform."""


def markdown(run: CacheRun, picture: str, engine_tokens: int) -> str:
    """The whole file. picture: the SVG's name beside it, empty without one."""
    sections = [
        "# KV cache: first tokens beside vLLM's own prefix cache and LMCache",
        f"```\n{run.command}\n```",
        versions(run.machine, run.date),
        bullets(setting_lines(run, run.header.text)),
        f"![first tokens]({picture})" if picture else "",
        *(f"## {table.title}\n\n{table.markdown()}" for table in tables_of(run)),
        "## What it means",
        bullets([*finding_lines(findings_of(run)), *problem_lines(run), *_notes(run)]),
        "## How it is measured",
        _HOW.format(engine=f"{engine_tokens:,}"),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def picture_of(run: CacheRun) -> str:
    """First tokens of every system: a prompt that was found, and each workload with most reuse."""
    tiers = [
        Mark(row.system, row.warm.median, row.warm.low, row.warm.high)
        for row in tier_rows(run)
        if row.system != "plain"
    ]
    groups = [Group(f"{run.header.prompt_tokens:,} tokens that were found", tuple(tiers))] if tiers else []
    rows = workload_rows(run)
    most = max((row.reuse for row in rows), default=0)
    for workload in dict.fromkeys(row.workload for row in rows):
        chosen = [row for row in rows if (row.workload, row.reuse) == (workload, most) and row.size != "small"]
        marks = tuple(
            Mark(row.system, row.first_token.median, row.first_token.median, row.p99_ms or row.first_token.median)
            for row in chosen
        )
        groups.append(Group(f"{workload}, {most} % reuse, more than the engine's own cache holds: p50 (to p99)", marks))
    return svg("Time to the first token", "ms", groups)


def file_name(run: CacheRun, folder_or_file: Path) -> Path:
    """See results_path."""
    return results_path("cache", run.machine, run.date, folder_or_file)


def _notes(run: CacheRun) -> list[str]:
    return [f"note: {text}" for text in run.machine.warnings()]
