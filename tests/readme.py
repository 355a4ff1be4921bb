"""The README as tests read it: its commands and its marked sections."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def commands() -> list[str]:
    """Every command of a ```bash block; a command may go over several lines while a quote is open."""
    result: list[str] = []
    for block in re.findall(r"```bash\n(.*?)```", README.read_text(), re.S):
        open_command = ""
        for line in block.splitlines():
            open_command = f"{open_command}\n{line}" if open_command else line
            if open_command.count("'") % 2 == 0:
                result.append(re.sub(r"\s{2,}#.*$", "", open_command).strip())
                open_command = ""
    return [command for command in result if command]


def section(name: str) -> str:
    """What stands between `<!-- name -->` and `<!-- /name -->`."""
    match = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README.read_text(), re.S)
    assert match is not None, f"the README has no section {name}"
    return match[1]


def replace_section(name: str, text: str) -> None:
    """Rewrites a marked section."""
    old = README.read_text()
    new = re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: m[1] + text + m[2], old, flags=re.S)
    README.write_text(new)
