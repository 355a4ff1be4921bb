"""What `baton bench cache` is asked for, read from its command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from benchmarks.cache_systems import SYSTEMS, CacheSystem, Kind
from benchmarks.lmcache import check_folder
from benchmarks.options import Parser, dtype_of, file_of, list_of, number_of, parsed
from benchmarks.redis_process import redis_binary
from benchmarks.shapes import shape_of
from benchmarks.systems import MAX_PROMPT_TOKENS, Recipe
from core.errors import ConfigError

PARTS = ("tiers", "workloads", "overhead", "lookup", "survive")
WORKLOADS = ("multi-turn", "rag", "summary", "code")
SHAPES_OF_DTYPE = {"float32": "qwen2.5-1.5b-half", "bfloat16": "qwen2.5-1.5b"}
"""28 layers and 28.7 kB of KV per token in either."""

PROMPT_TOKENS = 4000
REPEATS = 5
REUSE = "0,50,90"
SIZES = "small,large"
REQUESTS = 100
PAIRS = 12
QUICK_SYSTEMS = "plain,prefix,host"
QUICK_REUSE = "75"
QUICK_SIZES = "large"
QUICK_PROMPT_TOKENS = 2000
QUICK_REQUESTS = 10
QUICK_REPEATS = 2
QUICK_PAIRS = 10


class CacheOptions(msgspec.Struct, frozen=True):
    """reuse: shares of a workload's prompt tokens that earlier requests had, in percent. sizes: of working sets, beside
    the engine's own cache. requests: of one workload at one reuse rate. pairs: of the overhead. data: a folder with
    text; None: what comes with Baton. lmcache: where LMCache's packages are."""

    recipe: Recipe
    parts: tuple[str, ...]
    systems: tuple[CacheSystem, ...]
    workloads: tuple[str, ...]
    reuse: tuple[int, ...]
    sizes: tuple[str, ...]
    prompt_tokens: int
    repeats: int
    requests: int
    pairs: int
    data: Path | None = None
    lmcache: Path | None = None
    state: Path | None = None
    out: Path | None = None
    markdown: Path | None = None


def parse(arguments: Sequence[str], has_fast_bfloat16: bool) -> CacheOptions:
    """Raises ConfigError naming the option, and the nearest known one where it is not known."""
    given = parsed(_parser(), arguments)
    quick = bool(given.quick)
    dtype = dtype_of(given.dtype, has_fast_bfloat16)
    options = CacheOptions(
        recipe=Recipe(shape_of(SHAPES_OF_DTYPE[dtype]), dtype),
        parts=list_of("--parts", given.parts, _one_of("--parts", PARTS)),
        systems=_systems(given.systems or (QUICK_SYSTEMS if quick else ""), given.lmcache),
        workloads=list_of("--workloads", given.workloads, _one_of("--workloads", WORKLOADS)),
        reuse=list_of(
            "--reuse", given.reuse or (QUICK_REUSE if quick else REUSE), lambda text: number_of("--reuse", text, 0, 95)
        ),
        sizes=list_of(
            "--sizes", given.sizes or (QUICK_SIZES if quick else SIZES), _one_of("--sizes", tuple(SIZES.split(",")))
        ),
        prompt_tokens=number_of(
            "--prompt", given.prompt or str(QUICK_PROMPT_TOKENS if quick else PROMPT_TOKENS), 257, MAX_PROMPT_TOKENS
        ),
        repeats=number_of("--repeats", given.repeats or str(QUICK_REPEATS if quick else REPEATS), 1, 100),
        requests=number_of("--requests", given.requests or str(QUICK_REQUESTS if quick else REQUESTS), 8, 10_000),
        pairs=number_of("--pairs", given.pairs or str(QUICK_PAIRS if quick else PAIRS), 6, 1000),
        data=_folder("--data", given.data),
        lmcache=check_folder(Path(given.lmcache)) if given.lmcache else None,
        state=file_of("--state", given.state),
        out=file_of("--out", given.out),
        markdown=file_of("--markdown", given.markdown),
    )
    if any(system.tier == "redis" for system in options.systems):
        redis_binary()
    return options


def _parser() -> Parser:
    parser = Parser(
        "baton bench cache",
        description="Baton's KV cache beside vLLM's own prefix cache and LMCache: one engine at a time on one core.",
        allow_abbrev=False,
    )
    parser.add_argument("--parts", default=",".join(PARTS), metavar="NAME,...", help=f"of {', '.join(PARTS)} (all)")
    parser.add_argument("--systems", metavar="NAME,...", help=f"of {', '.join(SYSTEMS)} (all that can run here)")
    parser.add_argument(
        "--workloads", default=",".join(WORKLOADS), metavar="NAME,...", help=f"of {', '.join(WORKLOADS)} (all)"
    )
    parser.add_argument("--reuse", metavar="N,N", help=f"percent of prompt tokens that were there before ({REUSE})")
    parser.add_argument("--sizes", metavar="NAME,...", help=f"of working sets, beside the engine's cache ({SIZES})")
    parser.add_argument("--prompt", metavar="N", help=f"tokens, tiers ({PROMPT_TOKENS})")
    parser.add_argument("--repeats", metavar="N", help=f"samples of each tier ({REPEATS})")
    parser.add_argument("--requests", metavar="N", help=f"of a workload at one reuse rate ({REQUESTS})")
    parser.add_argument("--pairs", metavar="N", help=f"of the overhead ({PAIRS})")
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16, on processors without AVX-512 float32 (auto)")
    parser.add_argument("--data", metavar="FOLDER", help="*.txt and *.py to draw from (a play; Python's own library)")
    parser.add_argument("--lmcache", metavar="FOLDER", help="LMCache's packages, made by scripts/lmcache_env FOLDER")
    parser.add_argument("--state", metavar="FILE", help="finished cells; the same command goes on where it was stopped")
    parser.add_argument("--out", metavar="FILE.json", help="everything raw")
    parser.add_argument("--markdown", metavar="FILE", help="a results file; in a folder: [theme]_[hardware]_[date].md")
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_SYSTEMS} with less of everything: under ten minutes on two cores"
    )
    return parser


def _systems(text: str, lmcache: str | None) -> tuple[CacheSystem, ...]:
    """All that can run, if none is named."""
    if not text:
        return tuple(system for system in SYSTEMS.values() if lmcache or system.kind is not Kind.LMCACHE)
    systems = list_of("--systems", text, _system)
    if not lmcache and any(system.kind is Kind.LMCACHE for system in systems):
        raise ConfigError("--systems lmcache needs --lmcache FOLDER, made by scripts/lmcache_env FOLDER")
    return systems


def _system(text: str) -> CacheSystem:
    if text not in SYSTEMS:
        raise ConfigError(f"--systems: unknown system {text!r}; known: {', '.join(SYSTEMS)}")
    return SYSTEMS[text]


def _one_of(option: str, known: Sequence[str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in known:
            raise ConfigError(f"{option}: unknown {text!r}; known: {', '.join(known)}")
        return text

    return read


def _folder(option: str, text: str | None) -> Path | None:
    if text is None:
        return None
    path = Path(text)
    if not path.is_dir():
        raise ConfigError(f"{option} {text}: no such folder")
    return path
