"""The table at the end, as text and as Markdown, and the sentences below it."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.results import Run
from benchmarks.summary import Finding, Row, yard_of

HEADER = (
    ("prompt", "tokens"),
    ("system", ""),
    ("first token", "median ms"),
    ("", "min ms"),
    ("decode step", "ms"),
    ("over plain", "ms"),
    ("", "steps"),
    ("handed over", "MB"),
    ("copying", "GB/s"),
    ("of memcpy", "cold"),
    ("", "warm"),
    ("last layer to Landed", "median ms"),
    ("", "p90 ms"),
    ("valid", ""),
)


def cells(row: Row) -> list[str]:
    """One row, in the order of HEADER."""
    return [
        str(row.prompt_tokens),
        row.system,
        _shown(row.first_token_ms, 1),
        _shown(row.first_token_min_ms, 1),
        _shown(row.step_ms, 1),
        _signed(row.over_ms, 1),
        _signed(row.over_steps, 2),
        _shown(None if row.num_bytes is None else row.num_bytes / 1e6, 1),
        _shown(row.gb_per_s, 1),
        _shown(row.share, 2),
        _shown(row.share_warm, 2),
        _shown(row.tail_ms, 1),
        _shown(row.tail_p90_ms, 1),
        f"{row.num_valid}/{row.num_samples}" + ("" if row.is_valid else " NOT VALID"),
    ]


def text_table(rows: Sequence[Row]) -> str:
    """Two header lines, a rule, and a blank line between prompt lengths."""
    grid = [cells(row) for row in rows]
    # A header cell may reach into the columns of its group that have none.
    widths = [max(len(HEADER[i][1]), *(len(line[i]) for line in grid)) for i in range(len(HEADER))]
    lines = [_group_line(widths), _line([unit for _, unit in HEADER], widths)]
    lines.append("-" * max(map(len, lines)))
    last = ""
    for line in grid:
        if last and line[0] != last:
            lines.append("")
        last = line[0]
        lines.append(_line(line, widths))
    return "\n".join(lines)


def markdown_table(rows: Sequence[Row]) -> str:
    names, group = [], ""
    for name, unit in HEADER:
        group = name or group
        names.append(f"{group}, {unit}" if unit else group)
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    return "\n".join(lines + [f"| {' | '.join(cells(row))} |" for row in rows])


def memcpy_lines(run: Run) -> list[str]:
    """The yardstick, one line per prompt length."""
    lines = []
    for tokens in dict.fromkeys(copy.prompt_tokens for copy in run.copies):
        yard = yard_of(run.copies, tokens)
        if yard is not None:
            milliseconds = yard.num_bytes / yard.cold / 1e6
            lines.append(
                f"memcpy of {tokens} tokens' blocks ({yard.num_bytes / 1e6:.1f} MB): {yard.cold:.1f} GB/s cold "
                f"({milliseconds:.1f} ms), {yard.warm:.1f} with a warm source, {yard.run:.1f} cold in whole runs"
            )
    return lines


def part_lines(rows: Sequence[Row]) -> list[str]:
    """Where the time of a hand-off goes, as far as the records tell it."""
    lines = []
    for row in rows:
        parts = [
            ("inside the writes", row.write_ms, 1),
            ("more for the digest", row.digest_ms, 1),
            ("from the end of P's forward pass to Landed", row.computed_tail_ms, 1),
            ("from Landed leaving P", row.sent_tail_ms, 1),
            ("of which D's check", row.check_ms, 2),
            ("from Landed to the first token", row.landed_to_first_ms, 1),
        ]
        told = [f"{_shown(value, digits)} ms {name}" for name, value, digits in parts if value is not None]
        if told:
            lines.append(f"{row.system}, {row.prompt_tokens} tokens: {', '.join(told)}")
    return lines


def window_lines(rows: Sequence[Row]) -> list[str]:
    """What the writes column cannot say of a transport that sends in the background."""
    return [
        f"{row.system}, {row.prompt_tokens} tokens: {row.window_gb_per_s:.3f} GB/s from the first write to Landed, "
        "the computation in between included"
        for row in rows
        if row.gb_per_s is None and row.window_gb_per_s is not None
    ]


def setting_lines(run: Run) -> list[str]:
    """On which cores, in which chunks: what makes the systems comparable."""
    recipe, shape = run.recipe, run.recipe.shape
    cores = "; ".join(f"{name}: {','.join(map(str, used)) or 'unbound'}" for name, used in run.cores.items())
    return [
        f"engine cores: {cores}",
        f"every instance: {recipe.dtype}, max_num_batched_tokens {recipe.max_num_batched_tokens}, block size "
        f"{run.block_size}, KV cache {recipe.kv_cache_bytes >> 20} MiB",
        f"{shape.name}: {shape.like}, {recipe.token_bytes / 1e3:.1f} kB of KV per token, hidden size "
        f"{shape.hidden_size}, dummy weights",
    ]


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    words = {True: "as expected", False: "FALLS SHORT", None: "unknown"}
    return [f"{words[finding.met]}: {finding.text}" for finding in findings]


def _group_line(widths: Sequence[int]) -> str:
    """Names over their groups; each starts where its first column starts."""
    line, at = "", 0
    for (name, _), width in zip(HEADER, widths, strict=True):
        if name:
            line = line.ljust(at) + name + " "
        at += width + 2
    return line.rstrip()


def _line(texts: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(text.rjust(width) for text, width in zip(texts, widths, strict=True)).rstrip()


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _signed(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:+.{digits}f}"
