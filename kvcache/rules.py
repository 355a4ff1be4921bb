"""What a cache server keeps, for how long, for whom: the words of `--cache` that are no tiers.

8GiB,policy=lru,ttl=1h,quota=2GiB,write=back,admit=second,disk=/var/lib/baton:100GiB
"""

from __future__ import annotations

import enum
import re

import msgspec

from core.errors import ConfigError
from kvcache.policy import POLICIES


class Write(enum.Enum):
    """When a block goes down to the tiers: as soon as it is complete, or when its room in the arena is needed."""

    THROUGH = "through"
    BACK = "back"


class Admit(enum.Enum):
    """Which blocks go down: all of them, or those that a request has found, so that they were wanted twice."""

    ALL = "all"
    SECOND = "second"


class Rules(msgspec.Struct, frozen=True):
    """policy: a name of kvcache.policy.POLICIES. ttl_s: blocks that were not used for so long leave the arena; 0: they
    stay. quota_bytes: of the arena, for each tenant; 0: no bound. write, admit: how the tiers below get blocks."""

    policy: str = "lru"
    ttl_s: float = 0.0
    quota_bytes: int = 0
    write: Write = Write.THROUGH
    admit: Admit = Admit.ALL

    def __post_init__(self) -> None:
        if self.write is Write.BACK and self.admit is Admit.SECOND:
            raise ConfigError(
                "--cache: admit=second writes a block when it is used again, write=back when it is evicted"
            )


WORDS = ("policy", "ttl", "quota", "write", "admit")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def policy_named(text: str) -> str:
    """Raises ConfigError with the names that there are."""
    return _one_of("policy", text, tuple(POLICIES))


def duration_s(text: str) -> float:
    """Seconds of 90s, 15m, 1h or 7d. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"--cache: ttl={text} is not a time such as 90s, 15m, 1h or 7d")
    return float(match[1]) * _SECONDS[match[2]]


def write_named(text: str) -> Write:
    """Raises ConfigError with the words that there are."""
    return Write(_one_of("write", text, tuple(each.value for each in Write)))


def admit_named(text: str) -> Admit:
    """Raises ConfigError with the words that there are."""
    return Admit(_one_of("admit", text, tuple(each.value for each in Admit)))


def _one_of(option: str, text: str, known: tuple[str, ...]) -> str:
    if text not in known:
        raise ConfigError(f"--cache: {option}={text} is none of {', '.join(known)}")
    return text
