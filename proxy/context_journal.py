"""Contexts on disk, so that a proxy that is started again after its death knows their ids: one JSON line per change.

    {"kept": {context}}   {"dropped": "ctx-..."}   ...          read and rewritten without the dropped at each start

A line that was cut by the death of its writer is the last one and is left out. The file holds what clients have sent,
so it is readable by its owner alone. It is not flushed to the device: it outlives the process, not the host.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from core.errors import ConfigError
from proxy.contexts import Context


class _Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """One change."""

    kept: Context | None = None
    dropped: str = ""


class Journal:
    """A file of changes; without a path nothing is written. Raises ConfigError, in `load`, if it cannot be used."""

    def __init__(self, path: str) -> None:
        self._path = Path(path) if path else None
        self._file = -1

    def load(self) -> list[Context]:
        """The contexts that are there, and a file that holds them alone."""
        if self._path is None:
            return []
        try:
            contexts = self._read(self._path)
            new = self._path.with_name(self._path.name + ".new")
            new.unlink(missing_ok=True)
            self._file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            for context in contexts:
                self.kept(context)
            new.replace(self._path)
        except OSError as error:
            raise ConfigError(
                f"cannot keep contexts in {self._path}: {error.strerror or error}; name a file in a folder that this "
                "user may write to"
            ) from error
        return contexts

    def kept(self, context: Context) -> None:
        self._write(_Line(kept=context))

    def dropped(self, context_id: str) -> None:
        self._write(_Line(dropped=context_id))

    def _write(self, line: _Line) -> None:
        if self._file >= 0:
            os.write(self._file, msgspec.json.encode(line) + b"\n")

    def _read(self, path: Path) -> list[Context]:
        contexts: dict[str, Context] = {}
        for text in path.read_bytes().splitlines() if path.exists() else ():
            try:
                line = msgspec.json.decode(text, type=_Line)
            except msgspec.DecodeError:
                continue  # cut by the death of its writer
            if line.kept is not None:
                contexts[line.kept.id] = line.kept
            contexts.pop(line.dropped, None)
        return list(contexts.values())
