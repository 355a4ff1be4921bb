"""What `baton bench transfer` is asked for, read from its command line."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from benchmarks.kv_models import KV_MODELS, KVModel, kv_model
from benchmarks.mover_mooncake import check_folder
from benchmarks.options import Parser, file_of, list_of, number_of, parsed
from benchmarks.transfer_plan import GRAINS, Sweep
from benchmarks.transfer_systems import System, chosen
from core.errors import ConfigError

MODELS = "qwen2.5-0.5b,llama-3-8b,llama-3-70b,deepseek-v3"
BLOCKS = "piece,1,4,16,64,256,1024,4096"
MEMORY = "1GiB"
QUICK_MODELS = "qwen2.5-0.5b"
QUICK_BLOCKS = "piece,1,64,512"
QUICK_MEMORY = "512MiB"
QUICK_REPEATS = 5
QUICK_S = 45.0
"""Begun turns and leaving come on top: a minute in all."""

_UNITS = {"MiB": 1 << 20, "GiB": 1 << 30}


class TransferOptions(msgspec.Struct, frozen=True):
    """repeats: of every payload; 0: by its size. inside: measure the running 1P1D instead of transports alone."""

    models: tuple[KVModel, ...]
    sweep: Sweep
    systems: tuple[System, ...]
    inside: bool = False
    quick: bool = False
    out: Path | None = None
    markdown: Path | None = None
    picture: Path | None = None


def parse(arguments: list[str]) -> TransferOptions:
    """Raises ConfigError naming the option, and the nearest known one where it is not known."""
    given = parsed(_parser(), arguments)
    quick = bool(given.quick)
    mooncake = check_folder(Path(given.mooncake)) if given.mooncake else None
    repeats = given.repeats or (str(QUICK_REPEATS) if quick else "0")
    return TransferOptions(
        models=list_of("--models", given.models or (QUICK_MODELS if quick else MODELS), kv_model),
        sweep=Sweep(
            blocks=list_of("--blocks", given.blocks or (QUICK_BLOCKS if quick else BLOCKS), _blocks),
            grains=list_of("--grains", given.grains or ("end" if quick else ",".join(GRAINS)), _grain),
            pairs=list_of("--pairs", given.pairs, lambda text: number_of("--pairs", text, 1, 8)),
            block_size=number_of("--block-size", given.block_size, 1, 1024),
            memory_bytes=_memory(given.memory or (QUICK_MEMORY if quick else MEMORY)),
            repeats=number_of("--repeats", repeats, 0, 10_000),
            seconds=QUICK_S if quick else 0.0,
        ),
        systems=chosen(given.systems, mooncake),
        inside=bool(given.inside),
        quick=quick,
        out=file_of("--out", given.out),
        markdown=file_of("--markdown", given.markdown),
        picture=file_of("--picture", given.picture),
    )


def _parser() -> Parser:
    parser = Parser(
        "baton bench transfer",
        description="How long KV blocks take from one process to another: every transport beside a memcpy and peers.",
        allow_abbrev=False,
    )
    parser.add_argument("--models", metavar="NAME,...", help=f"of {', '.join(KV_MODELS)} ({MODELS})")
    parser.add_argument("--blocks", metavar="N,...", help=f"payloads; piece: one block of one layer ({BLOCKS})")
    parser.add_argument("--block-size", metavar="N", default="16", help="tokens (16)")
    parser.add_argument(
        "--grains", metavar="NAME,...", help="end: all layers at once; layer: each when it is computed (end,layer)"
    )
    parser.add_argument("--pairs", metavar="N,...", default="1", help="senders and receivers at the same time (1)")
    parser.add_argument("--systems", metavar="NAME,...", help="beside memcpy (all that can run here)")
    parser.add_argument("--mooncake", metavar="FOLDER", help="Mooncake's engine, made by scripts/mooncake_env FOLDER")
    parser.add_argument("--memory", metavar="SIZE", help=f"of each KV cache; a pair has 3 ({MEMORY})")
    parser.add_argument("--repeats", metavar="N", help="of each payload (100 to 5, fewer of large ones)")
    parser.add_argument("--inside", action="store_true", help="in a running 1P1D: from the last layer to Landed")
    parser.add_argument("--out", metavar="FILE.json", help="everything raw")
    parser.add_argument("--markdown", metavar="FILE", help="a results file; in a folder: [theme]_[hardware]_[date].md")
    parser.add_argument("--picture", metavar="FILE.svg", help="latency and bandwidth against size (beside --markdown)")
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_MODELS}, {QUICK_BLOCKS} blocks, {QUICK_REPEATS} times: a minute"
    )
    return parser


def _blocks(text: str) -> int:
    """0: a piece."""
    return 0 if text == "piece" else number_of("--blocks", text, 1, 1 << 20)


def _grain(text: str) -> str:
    if text not in GRAINS:
        raise ConfigError(f"--grains: unknown grain {text!r}; known: {', '.join(GRAINS)}")
    return text


def _memory(text: str) -> int:
    found = re.fullmatch(r"(\d+)(MiB|GiB)", text)
    if found is None:
        raise ConfigError(f"--memory {text}: a size like 512MiB or 2GiB is meant")
    return number_of("--memory", found[1], 1, 1 << 20) * _UNITS[found[2]]
