"""What `--cache` says, parsed: an arena and the tiers below it, or the socket of a server that runs already.

8GiB,disk=/var/lib/baton:100GiB,redis://10.0.0.5:6379,redis://10.0.0.6:6379,policy=lru,ttl=1h,quota=2GiB
│    │                                                                      └─ rules, anywhere after the size
│    └─ tiers, the nearest first; redis:// words in a row are the servers of one tier
└─ the arena's size
"""

from __future__ import annotations

import re

import msgspec

from core.errors import ConfigError
from kvcache import rules
from kvcache.rules import Rules

SPEC_VARIABLE = "BATON_CACHE"
"""How a server that was started gets it: not among its arguments, where every user of the host reads passwords."""

SMALLEST_BYTES = 1 << 20
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_REDIS = ("redis://", "rediss://", "unix://")
_TIERS = "disk=/FOLDER:SIZE (once) nor redis://HOST:PORT"


class DiskSpec(msgspec.Struct, frozen=True):
    """A folder of blocks."""

    folder: str
    num_bytes: int


class RedisSpec(msgspec.Struct, frozen=True):
    """Redis or Valkey servers that share the blocks."""

    urls: tuple[str, ...]


TierSpec = DiskSpec | RedisSpec


class CacheSpec(msgspec.Struct, frozen=True):
    """A size, tiers and rules, for a server of its own; or a socket."""

    num_bytes: int = 0
    socket: str = ""
    tiers: tuple[TierSpec, ...] = ()
    rules: Rules = Rules()
    text: str = ""

    @classmethod
    def parse(cls, text: str) -> CacheSpec:
        """Raises ConfigError with the form that is expected."""
        first, *words = text.split(",")
        if first.startswith("unix:") or "/" in first:
            return cls(socket=_socket(first, words), text=text)
        num_bytes = size(first, "a size such as 8GiB, or unix:/path/of/a/cache/server")
        options, words = _options_of(words)
        tiers: list[TierSpec] = []
        for word in words:
            _add(tiers, word)
        return cls(num_bytes=num_bytes, tiers=tuple(tiers), rules=_rules_of(options, has_tiers=bool(tiers)), text=text)


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


def _options_of(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The words that are rules, by option, and the others in their order."""
    options: dict[str, str] = {}
    others = []
    for word in words:
        option, _, value = word.partition("=")
        if option not in rules.WORDS:
            others.append(word)
        elif option in options:
            raise ConfigError(f"--cache: {option}= stands there twice, with {options[option]} and {value}")
        else:
            options[option] = value
    return options, others


def _rules_of(options: dict[str, str], *, has_tiers: bool) -> Rules:
    for option in ("write", "admit"):
        if option in options and not has_tiers:
            raise ConfigError(
                f"--cache: {option}={options[option]} is for the tiers below the arena, and there is none"
            )
    return Rules(
        policy=rules.policy_named(options.get("policy", "lru")),
        ttl_s=rules.duration_s(options["ttl"]) if "ttl" in options else 0.0,
        quota_bytes=size(options["quota"], "a size such as 2GiB, for each tenant") if "quota" in options else 0,
        write=rules.write_named(options.get("write", "through")),
        admit=rules.admit_named(options.get("admit", "all")),
    )


def _add(tiers: list[TierSpec], word: str) -> None:
    """One word of the list: a tier, or one more server of the tier before it."""
    if word.startswith(_REDIS):
        if tiers and isinstance(tiers[-1], RedisSpec):
            tiers[-1] = RedisSpec((*tiers[-1].urls, word))
        else:
            tiers.append(RedisSpec((word,)))
        return
    folder, _, num_bytes = word.removeprefix("disk=").rpartition(":")
    is_second = any(isinstance(tier, DiskSpec) for tier in tiers)
    if not word.startswith("disk=") or not folder.startswith("/") or is_second:
        raise ConfigError(f"--cache: {word!r} is neither {_TIERS} nor one of {', '.join(rules.WORDS)}=...")
    tiers.append(DiskSpec(folder, size(num_bytes, "a size such as 100GiB")))
