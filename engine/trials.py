"""Requests that compute with blocks which are compared only when the step is over.

    load in the step ──▶ ON TRIAL ── equal ──▶ what the step computed counts
                             └────── differs, or no answer ──▶ the engine's cache forgets every block from the first
                                                               loaded one on; the request computes them again

vLLM puts a request's blocks into its prefix cache when it allocates them. With a load of its own step that is before
they are filled, and when the load fails vLLM lets them stay there until they are computed again: so they are taken out
here, before anybody else can be scheduled with them.

Threads: the engine's thread alone.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Chunk(NamedTuple):
    """Prompt tokens that a step computes."""

    done_before: int
    num_new: int
    num_prompt: int


@dataclass
class Trial:
    """One request's: the blocks whose content is in doubt, and what it computes meanwhile."""

    block_ids: Sequence[int]
    chunk: Chunk | None = None


class Trials:
    """Of one step."""

    def __init__(self) -> None:
        self._evict: Callable[[set[int]], None] | None = None
        self._all: dict[str, Trial] = {}

    def watch(self, evict: Callable[[set[int]], None]) -> None:
        """How to make the engine's prefix cache forget blocks; without that, nobody may be on trial."""
        self._evict = evict

    def are_possible(self) -> bool:
        """Whether a failure could be undone."""
        return self._evict is not None

    def are_open(self) -> bool:
        """Whether somebody is on trial in the step that is being scheduled."""
        return bool(self._all)

    def block_ids(self, loading: Container[str] = ()) -> list[int]:
        """Of all who are on trial, but for these requests."""
        return [
            block_id
            for request_id, trial in self._all.items()
            if request_id not in loading
            for block_id in trial.block_ids
        ]

    def begin(self, request_id: str, block_ids: Sequence[int]) -> None:
        """block_ids: from the first that is loaded to the request's last."""
        self._all[request_id] = Trial(block_ids)

    def of(self, request_id: str) -> Trial | None:
        """None if it is not on trial."""
        return self._all.get(request_id)

    def end(self, request_id: str, *, is_lost: bool) -> Trial | None:
        """The step is over."""
        trial = self._all.pop(request_id, None)
        if trial is not None and is_lost and self._evict is not None:
            self._evict(set(trial.block_ids))
        return trial

    def unanswered(self) -> Iterable[str]:
        """Requests of which the step's answer has said nothing."""
        return list(self._all)
