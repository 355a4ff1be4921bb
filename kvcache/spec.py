"""What `--cache` says, parsed: an arena and the tiers below it, or the socket of a server that runs already.

8GiB,listen=10.0.0.5:7600,peer=10.0.0.6:7600,disk=/var/lib/baton:100GiB,codec=zstd,redis://10.0.0.5:6379,ttl=1h
│    │                    │                                             │                                 └─ rules,
│    │                    │                                             │                     anywhere after the size
│    │                    │                                             └─ how the tier before it keeps its blocks
│    │                    └─ tiers, the nearest first; peer= and redis:// words in a row are the servers of one tier
│    └─ where peers may ask this arena for blocks
└─ the arena's size
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from core.errors import ConfigError
from kvcache import rules
from kvcache.codecs import LOSSY, check_name
from kvcache.rules import Rules
from transport.address import is_address

SPEC_VARIABLE = "BATON_CACHE"
"""How a server that was started gets it: not among its arguments, where every user of the host reads passwords."""

SMALLEST_BYTES = 1 << 20
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_REDIS = ("redis://", "rediss://", "unix://")
_CODEC = "codec="
_LISTEN, _PEER = "listen=", "peer="
_TIERS = "disk=/FOLDER:SIZE, redis://HOST:PORT, s3://BUCKET/PREFIX, peer=HOST:PORT nor listen=HOST:PORT"


class DiskSpec(msgspec.Struct, frozen=True):
    """A folder of blocks. codec: by its name."""

    folder: str
    num_bytes: int
    codec: str = "raw"


class RedisSpec(msgspec.Struct, frozen=True):
    """Redis or Valkey servers that share the blocks. codec: by its name."""

    urls: tuple[str, ...]
    codec: str = "raw"


class PeersSpec(msgspec.Struct, frozen=True):
    """Cache servers of other hosts, by the address (HOST:PORT) where they listen to peers. codec: always raw."""

    peers: tuple[str, ...]
    codec: str = "raw"


class ObjectSpec(msgspec.Struct, frozen=True):
    """A place in an object store, or in anything else that fsspec reaches. codec: by its name."""

    url: str
    codec: str = "raw"


TierSpec = DiskSpec | RedisSpec | PeersSpec | ObjectSpec


class CacheSpec(msgspec.Struct, frozen=True):
    """A size, tiers and rules, for a server of its own; or a socket. listen: HOST:PORT for peers, empty for none."""

    num_bytes: int = 0
    socket: str = ""
    tiers: tuple[TierSpec, ...] = ()
    listen: str = ""
    rules: Rules = Rules()
    text: str = ""

    @property
    def is_on_the_network(self) -> bool:
        """Whether other hosts' caches are spoken to."""
        return bool(self.listen) or any(isinstance(tier, PeersSpec) for tier in self.tiers)

    @classmethod
    def parse(cls, text: str) -> CacheSpec:
        """Raises ConfigError with the form that is expected."""
        first, *words = text.split(",")
        if first.startswith("unix:") or "/" in first:
            return cls(socket=_socket(first, words), text=text)
        num_bytes = size(first, "a size such as 8GiB, or unix:/path/of/a/cache/server")
        options, words = _options_of(words)
        tiers: list[TierSpec] = []
        for before, word in zip([first, *words], words, strict=False):
            if word.startswith(_CODEC):
                _encode(tiers, word, before)
            elif not word.startswith(_LISTEN):
                _add(tiers, word, before)
        listen = _listen(words)
        _refuse_leak(tiers, listen)
        has_tiers = any(not isinstance(tier, PeersSpec) for tier in tiers)
        chosen = _rules_of(options, has_tiers=has_tiers)
        return cls(num_bytes=num_bytes, tiers=tuple(tiers), listen=listen, rules=chosen, text=text)


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
                f"--cache: {option}={options[option]} is for written tiers below the arena, and there is none"
            )
    return Rules(
        policy=rules.policy_named(options.get("policy", "lru")),
        ttl_s=rules.duration_s(options["ttl"]) if "ttl" in options else 0.0,
        quota_bytes=size(options["quota"], "a size such as 2GiB, for each tenant") if "quota" in options else 0,
        write=rules.write_named(options.get("write", "through")),
        admit=rules.admit_named(options.get("admit", "all")),
    )


def _refuse_leak(tiers: Sequence[TierSpec], listen: str) -> None:
    """What is computed after a rounded block is not exact either: hosts that have not asked for it must not get it."""
    lossy = next((tier.codec for tier in tiers if tier.codec in LOSSY), "")
    shared = next((_place(tier) for tier in tiers if _place(tier) and tier.codec not in LOSSY), "")
    said = f"--cache: codec={lossy} is not exact, nor is what is computed after its blocks, and"
    if lossy and shared:
        raise ConfigError(
            f"{said} {shared} would give that to other hosts as exact: put codec={lossy} behind it as well, or leave "
            "one of the two out"
        )
    if lossy and listen:
        raise ConfigError(f"{said} listen={listen} would give that to peers as exact: leave one of the two out")


def _place(tier: TierSpec) -> str:
    """Where other hosts find what this tier keeps; empty if they do not."""
    match tier:
        case RedisSpec():
            return tier.urls[0]
        case ObjectSpec():
            return tier.url
        case _:
            return ""


def _encode(tiers: list[TierSpec], word: str, before: str) -> None:
    """`codec=NAME`, for the tier before it. before: the word before."""
    if before.startswith(_CODEC):
        raise ConfigError(f"--cache: {before},{word}: a tier has one codec")
    if not tiers:
        raise ConfigError(f"--cache: {word} stands behind the tier that it is for, and no tier is before it")
    if isinstance(tiers[-1], PeersSpec):
        raise ConfigError(f"--cache: {word}: peers give their blocks as they are; a codec is for disk= and redis://")
    tiers[-1] = msgspec.structs.replace(tiers[-1], codec=check_name(word.removeprefix(_CODEC)))


def _listen(words: list[str]) -> str:
    """Where peers may ask, empty where no word says it."""
    places = [word for word in words if word.startswith(_LISTEN)]
    if len(places) > 1:
        raise ConfigError(f"--cache: {places[1]!r} is one too many; peers ask at one address")
    return _address(places[0].removeprefix(_LISTEN), 0) if places else ""


def _address(text: str, lowest_port: int) -> str:
    """HOST:PORT, checked."""
    port = text.rpartition(":")[2]
    is_port = port.isascii() and port.isdecimal() and lowest_port <= int(port) <= 65535
    if not is_port or not is_address(f"tcp://{text.rpartition(':')[0]}:{max(int(port), 1)}"):
        raise ConfigError(f"--cache: {text!r} is not HOST:PORT, such as 10.0.0.5:7600 or [fd00::5]:7600")
    return text


def _add_peer(tiers: list[TierSpec], peer: str) -> None:
    known = [each for tier in tiers if isinstance(tier, PeersSpec) for each in tier.peers]
    if peer in known:
        raise ConfigError(f"--cache: the peer {peer} is named twice")
    if not known:
        tiers.append(PeersSpec((peer,)))
    elif isinstance(tiers[-1], PeersSpec):
        tiers[-1] = PeersSpec((*known, peer))
    else:
        raise ConfigError(f"--cache: peer={peer} stands apart from the other peers; name them one after another")


def _add(tiers: list[TierSpec], word: str, before: str) -> None:
    """One word of the list: a tier, or one more server of the tier before it. before: the word before."""
    if word.startswith(_PEER):
        _add_peer(tiers, _address(word.removeprefix(_PEER), 1))
        return
    if word.startswith(_REDIS):
        if tiers and isinstance(tiers[-1], RedisSpec):
            if before.startswith(_CODEC):
                raise ConfigError(f"--cache: {before} stands behind the last server of its tier; {word} follows it")
            tiers[-1] = RedisSpec((*tiers[-1].urls, word))
        else:
            tiers.append(RedisSpec((word,)))
        return
    if re.match(r"[a-z][a-z0-9+.-]*://", word):
        if any(isinstance(tier, ObjectSpec) for tier in tiers):
            raise ConfigError(f"--cache: {word!r} is one too many; blocks are kept in one store of objects")
        tiers.append(ObjectSpec(word))
        return
    folder, _, num_bytes = word.removeprefix("disk=").rpartition(":")
    is_second = any(isinstance(tier, DiskSpec) for tier in tiers)
    if not word.startswith("disk=") or not folder.startswith("/") or is_second:
        raise ConfigError(f"--cache: {word!r} is neither {_TIERS} nor one of {', '.join(rules.WORDS)}=...")
    tiers.append(DiskSpec(folder, size(num_bytes, "a size such as 100GiB")))
