"""The results file: `[theme]_[hardware]_[date].md`, with the command, the versions, the table and what it means."""

from __future__ import annotations

from pathlib import Path

from benchmarks.memcpy import PASSES
from benchmarks.publish import bullets, results_path, versions
from benchmarks.results import Run
from benchmarks.summary import findings_of, rows_of
from benchmarks.table import finding_lines, markdown_table, memcpy_lines, part_lines, setting_lines, window_lines

_HOW = f"""\
Every system runs at once and is asked alone, by turns, beginning with another one each time; prompts are random tokens
that never repeat. Times are the client's, through the same proxy for all. One decode step is plain vLLM's median gap
between two tokens. *Copying* is the bytes over the time that the prefill worker's threads together spent copying
them (shm; elsewhere others move the bytes). The memcpy copies the same number of blocks of the same size, layer by
layer and chunk by chunk, between two shared memories of the KV cache's size, on the prefill core, beside each repeat
(median of {PASSES} passes each): *cold* after the processor's caches were swept, *warm* with each layer's source
written immediately before, which is closer to what a push meets. *Landed* is when the decode worker has checked
everything."""


def markdown(run: Run) -> str:
    """The whole file."""
    rows, machine = rows_of(run), run.machine
    sections = [
        f"# Hand-off: first token of 1P1D beside plain vLLM, {run.recipe.shape.name}",
        f"```\n{run.command}\n```",
        versions(run.machine, run.date),
        bullets(setting_lines(run)),
        markdown_table(rows),
        bullets([*memcpy_lines(run), *window_lines(rows), *part_lines(rows), *problem_lines(run)]),
        "## What it means",
        bullets([*finding_lines(findings_of(rows)), *(f"note: {text}" for text in machine.warnings())]),
        "## How it is measured",
        _HOW,
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def file_name(run: Run, folder_or_file: Path) -> Path:
    """See results_path."""
    return results_path("handoff", run.machine, run.date, folder_or_file)


def problem_lines(run: Run) -> list[str]:
    """Samples that do not count, each with its reason."""
    return [
        f"NOT VALID: {sample.system}, {sample.prompt_tokens} tokens, repeat {sample.repeat + 1}: {sample.problem}"
        for sample in run.samples
        if sample.problem
    ]
