"""Real text, as tokens of the bundled tokenizer: prose for documents and conversations, Python for code.

Prose is the largest *.txt of a folder, by default a play that comes with Baton. Code is the folder's *.py, by default
modules of Python's own library: real code that every user has.
"""

from __future__ import annotations

import platform
import random
import sysconfig
from pathlib import Path

from tokenizers import Tokenizer

from cluster.bundled import BUNDLED_FOLDER
from core.errors import ConfigError

BUNDLED_TEXT = Path(__file__).resolve().parent / "text"
MODULES = ("argparse", "dataclasses", "pathlib", "shutil", "subprocess", "tarfile", "threading", "typing", "zipfile")
SMALLEST_TOKENS = 8_192
_ENCODED_BYTES = 2 << 20
"""Of either kind: more makes no difference but to the start."""


class Corpus:
    """Two long runs of tokens, and where they come from."""

    def __init__(self, prose: list[int], code: list[int], source: str) -> None:
        """Raises ConfigError where there is too little to draw from."""
        for name, tokens in (("prose", prose), ("code", code)):
            if len(tokens) < SMALLEST_TOKENS:
                raise ConfigError(f"{source}: {len(tokens)} tokens of {name} are too few, {SMALLEST_TOKENS} are needed")
        self._prose = prose
        self._code = code
        self.source = source

    def prose(self, num_tokens: int, dice: random.Random) -> list[int]:
        """A passage from anywhere."""
        return _passage(self._prose, num_tokens, dice)

    def code(self, num_tokens: int, dice: random.Random) -> list[int]:
        """Consecutive lines from anywhere."""
        return _passage(self._code, num_tokens, dice)


def read_corpus(folder: Path | None) -> Corpus:
    """Raises ConfigError if the folder has no text, or too little."""
    tokenizer = Tokenizer.from_file(str(BUNDLED_FOLDER / "tokenizer.json"))
    texts = sorted((folder or BUNDLED_TEXT).glob("*.txt"), key=lambda path: path.stat().st_size)
    if not texts:
        raise ConfigError(f"--data {folder}: no *.txt in it")
    modules = sorted(folder.glob("*.py")) if folder else []
    code_source = "its *.py" if modules else f"the standard library of Python {platform.python_version()}"
    library = Path(sysconfig.get_path("stdlib"))
    modules = modules or [library / f"{name}.py" for name in MODULES]
    code = "\n".join(path.read_text(errors="replace") for path in modules if path.is_file())
    prose = texts[-1].read_text(errors="replace")
    return Corpus(
        list(tokenizer.encode(prose[:_ENCODED_BYTES], add_special_tokens=False).ids),
        list(tokenizer.encode(code[:_ENCODED_BYTES], add_special_tokens=False).ids),
        f"{texts[-1].name}; code: {code_source}",
    )


def _passage(tokens: list[int], num_tokens: int, dice: random.Random) -> list[int]:
    """Round the end back to the beginning, where a passage is longer than what is left."""
    at = dice.randrange(len(tokens))
    result: list[int] = []
    while len(result) < num_tokens:
        result += tokens[at : at + num_tokens - len(result)]
        at = 0
    return result
