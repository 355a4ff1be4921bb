"""The lines of a log that say why its process ended."""

from __future__ import annotations

import re
from pathlib import Path

_TAIL_BYTES = 256 << 10
_PREFIX = re.compile(r"^\([\w ]+ pid=\d+\) ?")
_LEVEL = re.compile(r"^(DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?")
_FRAME = re.compile(r'^\s*File ".*", line \d+')
_NAMED_ERROR = re.compile(r"^\s*[\w.]*(Error|Exception|Interrupt|error):")
_MOST_DETAIL = 5
_ROOT_CAUSE = "See root cause above"


def last_lines(path: Path, count: int = 15) -> list[str]:
    """At most `count` lines: named errors where there are any, else the last lines, without vLLM's prefixes."""
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - _TAIL_BYTES, 0))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line for line in _plain(text.splitlines()) if line.strip()]
    errors = list(
        dict.fromkeys(_with_detail(lines, index) for index, line in enumerate(lines) if _NAMED_ERROR.match(line))
    )
    if errors:
        causes = [error for error in errors if _ROOT_CAUSE not in error]
        return "\n".join(causes or errors).splitlines()[-count:]
    return lines[-count:]


def _with_detail(lines: list[str], index: int) -> str:
    """The line of an error with the indented lines below it, where pydantic says what was wrong."""
    end = index + 1
    while end < min(len(lines), index + _MOST_DETAIL) and lines[end].startswith("  "):
        end += 1
    return "\n".join([lines[index].strip(), *lines[index + 1 : end]])


def _plain(lines: list[str]) -> list[str]:
    """Without prefixes, and without what is not about the end: notes, and the frames of tracebacks with their code."""
    result: list[str] = []
    after_frame = False
    for line in lines:
        line = _PREFIX.sub("", line)
        level = _LEVEL.match(line)
        line = _LEVEL.sub("", line)
        frame = _FRAME.match(line) is not None
        if not frame and not after_frame and not (level and level[1] in ("DEBUG", "INFO", "WARNING")):
            result.append(line)
        after_frame = frame
    return result or lines
