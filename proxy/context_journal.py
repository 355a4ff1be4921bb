"""Contexts on disk, so that a proxy that is started again after its death knows their ids: one JSON line per change.

    {"kept": {context}}   {"dropped": "ctx-..."}   ...     rewritten without the dropped at a start, and when it is long

A line that was cut by the death of its writer is the last one and is left out. The file holds what clients have sent,
so it is readable by its owner alone. It is not flushed to the device: it outlives the process, not the host.

Memory: the contexts are the store's own objects. Threading: the event loop's thread alone, which waits for the writes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

from core.errors import ConfigError
from proxy.contexts import Context

MOST_BYTES = 8 << 20
"""A file that is longer, and twice as long as after its last rewriting, is rewritten."""


class _Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """One change."""

    kept: Context | None = None
    dropped: str = ""


class Journal:
    """A file of changes; without a path nothing is written."""

    def __init__(self, path: str) -> None:
        self._path = Path(path) if path else None
        self._contexts: dict[str, Context] = {}
        self._file = -1
        self._num_bytes = 0
        self._rewritten_bytes = 0

    def load(self) -> list[Context]:
        """The contexts that are there. Raises ConfigError if the file cannot be used."""
        if self._path is None:
            return []
        try:
            self._contexts = _read(self._path)
            self._rewrite(self._path)
        except OSError as error:
            raise ConfigError(
                f"cannot keep contexts in {self._path}: {error.strerror or error}; name a file in a folder that this "
                "user may write to"
            ) from error
        return list(self._contexts.values())

    def kept(self, context: Context) -> None:
        """It is there from now on. A disk that takes no more costs the file, not the context."""
        self._contexts[context.id] = context
        self._change(_Line(kept=context))

    def dropped(self, context_id: str) -> None:
        self._contexts.pop(context_id, None)
        self._change(_Line(dropped=context_id))

    def _change(self, line: _Line) -> None:
        if self._file < 0 or self._path is None:
            return
        try:
            self._write(line)
            if self._num_bytes > max(MOST_BYTES, 2 * self._rewritten_bytes):
                self._rewrite(self._path)
        except OSError as error:
            print(f"proxy: contexts will not outlive this proxy: {self._path}: {error.strerror}", file=sys.stderr)
            self.close()

    def close(self) -> None:
        """Nothing is written any more. May be called again."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _write(self, line: _Line) -> None:
        data = msgspec.json.encode(line) + b"\n"
        while data:
            written = os.write(self._file, data)
            self._num_bytes += written
            data = data[written:]

    def _rewrite(self, path: Path) -> None:
        """Under a name of its own first: whoever dies here leaves the old file."""
        new, old_file = path.with_name(path.name + ".new"), self._file
        new.unlink(missing_ok=True)
        self._file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        if old_file >= 0:
            os.close(old_file)
        self._num_bytes = 0
        for context in self._contexts.values():
            self._write(_Line(kept=context))
        self._rewritten_bytes = self._num_bytes
        new.replace(path)


def _read(path: Path) -> dict[str, Context]:
    contexts: dict[str, Context] = {}
    for text in path.read_bytes().splitlines() if path.exists() else ():
        try:
            line = msgspec.json.decode(text, type=_Line)
        except msgspec.DecodeError:
            continue  # cut by the death of its writer
        if line.kept is not None:
            contexts[line.kept.id] = line.kept
        contexts.pop(line.dropped, None)
    return contexts
