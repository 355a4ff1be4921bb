"""What `--cache` says, parsed: an arena and the tiers below it, or the socket of a server that runs already.

8GiB,disk=/var/lib/baton:100GiB,codec=zstd,redis://10.0.0.5:6379,redis://10.0.0.6:6379
│    │                          └─ how the tier before it keeps its blocks
│    └─ tiers, the nearest first; redis:// words in a row are the servers of one tier
└─ the arena's size
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from core.errors import ConfigError
from kvcache.codecs import LOSSY, check_name

SPEC_VARIABLE = "BATON_CACHE"
"""How a server that was started gets it: not among its arguments, where every user of the host reads passwords."""

SMALLEST_BYTES = 1 << 20
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_REDIS = ("redis://", "rediss://", "unix://")
_CODEC = "codec="
_TIERS = "disk=/FOLDER:SIZE (once) nor redis://HOST:PORT"


class DiskSpec(msgspec.Struct, frozen=True):
    """A folder of blocks. codec: by its name."""

    folder: str
    num_bytes: int
    codec: str = "raw"


class RedisSpec(msgspec.Struct, frozen=True):
    """Redis or Valkey servers that share the blocks. codec: by its name."""

    urls: tuple[str, ...]
    codec: str = "raw"


TierSpec = DiskSpec | RedisSpec


class CacheSpec(msgspec.Struct, frozen=True):
    """A size and tiers, for a server of its own; or a socket."""

    num_bytes: int = 0
    socket: str = ""
    tiers: tuple[TierSpec, ...] = ()
    text: str = ""

    @classmethod
    def parse(cls, text: str) -> CacheSpec:
        """Raises ConfigError with the form that is expected."""
        first, *words = text.split(",")
        if first.startswith("unix:") or "/" in first:
            return cls(socket=_socket(first, words), text=text)
        num_bytes = size(first, "a size such as 8GiB, or unix:/path/of/a/cache/server")
        tiers: list[TierSpec] = []
        for before, word in zip([first, *words], words, strict=False):
            if word.startswith(_CODEC):
                _encode(tiers, word, before)
            else:
                _add(tiers, word, before)
        _refuse_leak(tiers)
        return cls(num_bytes=num_bytes, tiers=tuple(tiers), text=text)


def size(text: str, wanted: str) -> int:
    """Bytes. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"--cache: {text!r} is not {wanted}")
    num_bytes = int(float(match[1]) * _UNITS[match[2].upper()])
    if num_bytes < SMALLEST_BYTES:
        raise ConfigError(f"--cache: less than 1MiB holds nothing; {text}: did you mean {match[1]}GiB?")
    return num_bytes


def _socket(first: str, words: list[str]) -> str:
    path = first.removeprefix("unix:")
    if not path.startswith("/"):
        raise ConfigError(f"--cache {first}: the socket of a cache server is an absolute path")
    if words:
        raise ConfigError(f"--cache {first}: a server that runs already has its tiers; give its socket alone")
    return path


def _refuse_leak(tiers: Sequence[TierSpec]) -> None:
    """What is computed after a rounded block is not exact either: hosts that have not asked for it must not get it."""
    lossy = next((tier.codec for tier in tiers if tier.codec in LOSSY), "")
    shared = next((tier.urls[0] for tier in tiers if isinstance(tier, RedisSpec) and tier.codec not in LOSSY), "")
    if lossy and shared:
        raise ConfigError(
            f"--cache: codec={lossy} is not exact, nor is what is computed after its blocks, and {shared} would give "
            f"that to other hosts as exact: put codec={lossy} behind it as well, or leave one of the two out"
        )


def _encode(tiers: list[TierSpec], word: str, before: str) -> None:
    """`codec=NAME`, for the tier before it. before: the word before."""
    if before.startswith(_CODEC):
        raise ConfigError(f"--cache: {before},{word}: a tier has one codec")
    if not tiers:
        raise ConfigError(f"--cache: {word} stands behind the tier that it is for, and no tier is before it")
    tiers[-1] = msgspec.structs.replace(tiers[-1], codec=check_name(word.removeprefix(_CODEC)))


def _add(tiers: list[TierSpec], word: str, before: str) -> None:
    """One word of the list: a tier, or one more server of the tier before it. before: the word before."""
    if word.startswith(_REDIS):
        if tiers and isinstance(tiers[-1], RedisSpec):
            if before.startswith(_CODEC):
                raise ConfigError(f"--cache: {before} stands behind the last server of its tier; {word} follows it")
            tiers[-1] = RedisSpec((*tiers[-1].urls, word))
        else:
            tiers.append(RedisSpec((word,)))
        return
    folder, _, num_bytes = word.removeprefix("disk=").rpartition(":")
    is_second = any(isinstance(tier, DiskSpec) for tier in tiers)
    if not word.startswith("disk=") or not folder.startswith("/") or is_second:
        raise ConfigError(f"--cache: {word!r} is neither {_TIERS}")
    tiers.append(DiskSpec(folder, size(num_bytes, "a size such as 100GiB")))
