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


def shares_of_instances(cores: Sequence[int], ranks: Sequence[int]) -> list[tuple[int, ...]]:
    """Of each instance, by its tensor-parallel ranks: as many cores for each rank as for every other.

    With fewer cores than ranks, instances get equal shares and the ranks of one share its own: a rank spins while it
    waits for another, and keeps its core from whoever else is there (measured: for up to three seconds).
    """
    if len(cores) < sum(ranks):
        return shares(cores, len(ranks))
    of_ranks = iter(shares(cores, sum(ranks)))
    return [tuple(core for _ in range(count) for core in next(of_ranks)) for count in ranks]


def parse(text: str) -> tuple[int, ...]:
    """vLLM's notation: `0,2-4`, or `0,2|3,4` for two ranks, which get equal shares again. Empty for `nobind`."""
    if text == UNBOUND:
        return ()
    result: list[int] = []
    for part in text.replace("|", ",").split(","):
        first, _, last = part.partition("-")
        result.extend(range(int(first), int(last or first) + 1))
    return tuple(result)
