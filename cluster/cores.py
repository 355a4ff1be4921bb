"""Which cores each instance's engine computes on: equal shares, so that no two engines spin against each other."""

from __future__ import annotations

from collections.abc import Sequence

AUTOMATIC = ("", "auto")
UNBOUND = "nobind"


def shares(cores: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Equal shares of neighbouring cores; with fewer cores than instances, one each, wrapping around."""
    if count >= len(cores):
        return [(cores[index % len(cores)],) for index in range(count)]
    size = len(cores) // count
    return [tuple(cores[index * size : (index + 1) * size]) for index in range(count)]


def parse(text: str) -> tuple[int, ...]:
    """vLLM's notation: `0,2-4`, or `0,2|3,4` for two ranks, which get equal shares again. Empty for `nobind`."""
    if text == UNBOUND:
        return ()
    result: list[int] = []
    for part in text.replace("|", ",").split(","):
        first, _, last = part.partition("-")
        result.extend(range(int(first), int(last or first) + 1))
    return tuple(result)
