"""A progress bar on one line; where nobody watches a terminal, a line every ten seconds."""

from __future__ import annotations

from typing import TextIO

from core.clock import Clock

_WIDTH = 24
_REPEAT_S = 10.0


class Bar:
    """`show` before each piece of work, `advance` by its weight after it."""

    def __init__(self, stream: TextIO, clock: Clock, total: float) -> None:
        self._stream = stream
        self._clock = clock
        self._total = total
        self._done = 0.0
        self._start_s = clock.monotonic_s()
        self._printed_s = self._start_s - _REPEAT_S
        self._refreshed = stream.isatty()

    def expect(self, total: float) -> None:
        """The weight of everything, where it was not known at the start."""
        self._total = total

    def show(self, text: str) -> None:
        """What is being done now."""
        line = self.line(text)
        if self._refreshed:
            self._stream.write(f"\r\033[K{line}")
            self._stream.flush()
        elif self._clock.monotonic_s() - self._printed_s >= _REPEAT_S:
            self._printed_s = self._clock.monotonic_s()
            print(line, file=self._stream, flush=True)

    def advance(self, weight: float) -> None:
        self._done = min(self._done + weight, self._total)

    def close(self) -> None:
        """Takes the line away."""
        if self._refreshed:
            self._stream.write("\r\033[K")
            self._stream.flush()

    def line(self, text: str) -> str:
        """Bar, percent, time left, text."""
        share = self._done / self._total if self._total else 1.0
        filled = int(share * _WIDTH)
        spent_s = self._clock.monotonic_s() - self._start_s
        left = f"{spent_s / share - spent_s:.0f} s left" if share else "measuring"
        return f"  [{'#' * filled}{'.' * (_WIDTH - filled)}] {share:4.0%}  {left}  {text}"
