"""Faults that fire inside a real engine at a named place, for tests of recovery.

A test starts an instance with `fault` in the connector's extra configuration; when the named phase, layer and chunk
are reached for the n-th time, the fact is appended to `record` (one JSON line) and the action is taken. Without the
option every call returns at once.

Phases: `asked` (P's engine looks at the request), `accepted` (P has D's Accept), `push` (a layer is about to be
pushed), `landed` (P has sent Landed), `reserved` (D is about to send Accept), `checking` (D has P's Landed);
`load` (a block of the KV cache is about to be read; chunk counts blocks), `store` (a layer is about to be stored).
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import msgspec


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where to fail, and how. -1 means any layer or chunk; action: kill, stop (SIGSTOP) or note (record only)."""

    phase: str
    record: str
    action: str = "kill"
    layer: int = -1
    chunk: int = -1
    after: int = 0


class FaultPoint:
    """Counts arrivals at the fault's place and acts once."""

    def __init__(self, fault: Fault | None = None) -> None:
        self._fault = fault
        self._seen = 0

    def reach(self, phase: str, *, layer: int = -1, chunk: int = -1) -> None:
        """Says that a place is reached."""
        fault = self._fault
        if fault is None or fault.phase != phase:
            return
        if (fault.layer not in (-1, layer)) or (fault.chunk not in (-1, chunk)):
            return
        self._seen += 1
        if self._seen != fault.after + 1:
            return
        line = msgspec.json.encode({"phase": phase, "layer": layer, "chunk": chunk, "pid": os.getpid()})
        with Path(fault.record).open("ab") as record:
            record.write(line + b"\n")
        if fault.action != "note":
            os.kill(os.getpid(), signal.SIGKILL if fault.action == "kill" else signal.SIGSTOP)
