"""What the launcher waits for, with seconds: one refreshed line on a terminal, a line per change elsewhere."""

from __future__ import annotations

import time
from typing import TextIO

_REPEAT_S = 10.0


class Progress:
    """`waiting` while something goes on, `note` for what stays to be read."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._refreshed = stream.isatty()
        self._text = self._line = ""
        self._start_s = self._printed_s = time.monotonic()

    def waiting(self, text: str) -> None:
        """May be called as often as one likes."""
        now = time.monotonic()
        if text != self._text:
            self._text, self._printed_s = text, 0.0
        if self._refreshed:
            line = f"  {text} ... {now - self._start_s:.0f} s"
            if line != self._line:
                self._line = line
                self._stream.write(f"\r\033[K{line}")
                self._stream.flush()
        elif now - self._printed_s >= _REPEAT_S:
            self._printed_s = now
            print(f"  {text} ... {now - self._start_s:.0f} s", file=self._stream, flush=True)

    def note(self, text: str) -> None:
        if self._refreshed:
            self._stream.write("\r\033[K")
        print(f"  {text}", file=self._stream, flush=True)
        self._text = self._line = ""

    def done(self, text: str) -> None:
        """A note with the seconds since the start."""
        self.note(f"{text} after {time.monotonic() - self._start_s:.1f} s")
