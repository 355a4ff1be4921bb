"""Joins what the tensor-parallel ranks of one instance answer one by one, each when it is ready.

    rank 0: load of r ended ──┐
    rank 1: load of r ended ──┴──▶ one answer for r: lost if it is lost on any rank

Memory model: one entry per request that some ranks have answered and others have not. Threads: the engine's alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, Protocol, TypeVar


class OfRequest(Protocol):
    """One rank's answer to what a request asked for once."""

    @property
    def request_id(self) -> str: ...


A = TypeVar("A", bound=OfRequest)


class OfAllRanks(Generic[A]):
    """Answers of one kind. join: makes one of two ranks' answers."""

    def __init__(self, num_ranks: int, join: Callable[[A, A], A]) -> None:
        self._num_ranks = num_ranks
        self._join = join
        self._begun: dict[str, tuple[int, A]] = {}

    def take(self, answers: Iterable[A]) -> list[A]:
        """Adds answers of any ranks; returns those that every rank has given now."""
        complete = []
        for answer in answers:
            count, joined = self._begun.pop(answer.request_id, (0, answer))
            joined = self._join(joined, answer) if count else answer
            if count + 1 == self._num_ranks:
                complete.append(joined)
            else:
                self._begun[answer.request_id] = count + 1, joined
        return complete
