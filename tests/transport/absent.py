"""A transport whose library is not there, for tests of how that is told. See transport/schemes.py."""

from __future__ import annotations

from core.errors import TransferError
from transport.base import Transport


def make(host: str) -> Transport:
    raise TransferError("libabsent is not installed")


def unavailable() -> str:
    return "libabsent is not installed: pip install absent"


def is_reachable(description: bytes) -> bool:
    return False
