"""Tasks that nobody waits for: the event loop holds them only weakly, so somebody must."""

from __future__ import annotations

import asyncio
from typing import TypeVar

T = TypeVar("T")


class Tasks:
    """Held until they have ended."""

    def __init__(self) -> None:
        self._all: set[asyncio.Task[object]] = set()

    def keep(self, task: asyncio.Future[T]) -> None:
        """Holds one that runs."""
        if isinstance(task, asyncio.Task):
            self._all.add(task)
            task.add_done_callback(self._all.discard)

    def cancel(self) -> None:
        """Ends all of them."""
        for task in list(self._all):
            task.cancel()
