"""One thing that was looked at on this machine, what it means, and what to do about it."""

from __future__ import annotations

import enum

import msgspec


class Verdict(enum.Enum):
    """OK: nothing to do. NOTE: works, and could be better. FIX: must be put right."""

    OK = "ok"
    NOTE = "note"
    FIX = "FIX"


class Finding(msgspec.Struct, frozen=True):
    """name: what was looked at; value: what was found; advice: what to do, or why it does not matter."""

    name: str
    value: str
    verdict: Verdict = Verdict.OK
    advice: str = ""
