"""What `baton bench handoff` is asked for, read from its command line."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

import msgspec

from benchmarks.shapes import SHAPES, shape_of
from benchmarks.systems import (
    ELEMENT_BYTES,
    MAX_NUM_BATCHED_TOKENS,
    MAX_PROMPT_TOKENS,
    MIN_PROMPT_TOKENS,
    SYSTEMS,
    Recipe,
    System,
)
from core.errors import ConfigError

PROMPTS = "512,2048,4000"
REPEATS = 5
QUICK_PROMPTS = "256,512"
QUICK_REPEATS = 2

T = TypeVar("T")


class HandoffOptions(msgspec.Struct, frozen=True):
    """out, markdown: files to write."""

    recipe: Recipe
    prompts: tuple[int, ...]
    repeats: int
    systems: tuple[System, ...]
    out: Path | None = None
    markdown: Path | None = None


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def parse(arguments: Sequence[str], has_fast_bfloat16: bool) -> HandoffOptions:
    """Raises ConfigError naming the option, and the nearest known one where it is not known."""
    given = parsed(_parser(), arguments)
    quick_prompts, quick_repeats = (QUICK_PROMPTS, QUICK_REPEATS) if given.quick else (PROMPTS, REPEATS)
    return HandoffOptions(
        recipe=Recipe(
            shape_of(given.shape),
            dtype_of(given.dtype, has_fast_bfloat16),
            number_of("--max-num-batched-tokens", given.max_num_batched_tokens, 128, 65536),
        ),
        prompts=list_of("--prompts", given.prompts or quick_prompts, _prompt),
        repeats=number_of("--repeats", given.repeats or str(quick_repeats), 1, 1000),
        systems=list_of("--systems", given.systems, _system),
        out=file_of("--out", given.out),
        markdown=file_of("--markdown", given.markdown),
    )


def parsed(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """Raises ConfigError for an argument that is not known."""
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1, cutoff=0.5)
        raise ConfigError(
            f"unknown argument {unknown[0]!r}; "
            + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}")
        )
    return given


def _parser() -> Parser:
    parser = Parser(
        "baton bench handoff",
        description="Time to first token of plain vLLM and of 1P1D on the same cores, and the hand-off beside memcpy.",
        allow_abbrev=False,
    )
    parser.add_argument("--shape", default="qwen2.5-1.5b", help=f"of the KV cache: {', '.join(SHAPES)} (qwen2.5-1.5b)")
    parser.add_argument("--prompts", metavar="N,N", help=f"prompt lengths in tokens ({PROMPTS})")
    parser.add_argument("--repeats", metavar="N", help=f"samples per system and length ({REPEATS})")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help=f"what is compared ({','.join(SYSTEMS)})")
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16, on processors without AVX-512 float32 (auto)")
    batched = str(MAX_NUM_BATCHED_TOKENS)
    parser.add_argument("--max-num-batched-tokens", metavar="N", default=batched, help=f"vLLM's default ({batched})")
    parser.add_argument("--out", metavar="FILE.json", help="everything raw")
    parser.add_argument("--markdown", metavar="FILE", help="a results file; in a folder: [theme]_[hardware]_[date].md")
    parser.add_argument("--quick", action="store_true", help=f"prompts {QUICK_PROMPTS}, {QUICK_REPEATS} repeats")
    return parser


def list_of(option: str, text: str, read: Callable[[str], T]) -> tuple[T, ...]:
    """What a comma separates, each once. Raises ConfigError."""
    values = tuple(read(part.strip()) for part in text.split(","))
    if len(set(values)) != len(values):
        raise ConfigError(f"{option} {text} names something twice")
    return values


def _prompt(text: str) -> int:
    return number_of("--prompts", text, MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS)


def _system(text: str) -> System:
    if text not in SYSTEMS:
        raise ConfigError(f"--systems: unknown system {text!r}; known: {', '.join(SYSTEMS)}")
    return SYSTEMS[text]


def dtype_of(text: str, has_fast_bfloat16: bool) -> str:
    """The one that is meant. Raises ConfigError.

    Without AVX-512 a bfloat16 product is 6 times slower than one in float32 (5 against 32 GFLOP/s, EPYC 7001).
    """
    if text == "auto":
        return "bfloat16" if has_fast_bfloat16 else "float32"
    if text not in ELEMENT_BYTES:
        raise ConfigError(f"--dtype: unknown dtype {text!r}; known: auto, {', '.join(ELEMENT_BYTES)}")
    return text


def number_of(option: str, text: str, low: int, high: int) -> int:
    """Raises ConfigError."""
    try:
        value = int(text)
    except ValueError:
        raise ConfigError(f"{option}: {text!r} is not a number") from None
    if not low <= value <= high:
        raise ConfigError(f"{option}: {value} is not between {low} and {high}")
    return value


def file_of(option: str, text: str | None) -> Path | None:
    """Found out before an hour of measuring, not after."""
    if text is None:
        return None
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{option} {text}: no such folder")
    return path
