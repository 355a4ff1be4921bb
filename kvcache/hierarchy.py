"""The tiers below the arena, seen from its server: blocks go down by the rules and come up when asked for.

    Descent: what is complete, or has to leave ──▶ put             Ascent: contains, then get ──▶ the arena

A tier that fails or is late is bypassed by its breaker.

Memory model: tiers read and write the server's mapping of the arena.
Threading: the server's event loop; tiers' calls run in a small pool of threads per tier.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from core.clock import Clock
from kvcache.ascent import Ascent
from kvcache.descent import PUT_TIMEOUT_S, Descent
from kvcache.index import Index
from kvcache.keys import BlockKey
from kvcache.level import Level
from kvcache.shape import KnownShapes
from kvcache.tasks import Tasks
from kvcache.tier import Tier
from transport.mapping import Mapping

CLEAR_TIMEOUT_S = 30.0


class Hierarchy:
    """All tiers below one arena, the nearest first."""

    def __init__(
        self, tiers: Sequence[Tier], index: Index, arena: Mapping, clock: Clock, shapes: KnownShapes | None = None
    ) -> None:
        """shapes: told of by clients, asked by tiers that encode."""
        self.shapes = shapes or KnownShapes()
        self.levels = [Level(tier, clock) for tier in tiers]
        self._tasks = Tasks()
        self.down = Descent([level for level in self.levels if level.tier.is_written], index, arena, self._tasks)
        self.up = Ascent(self.levels, index, arena, self._tasks, self.down.came_up)
        self.num_clearing = 0

    def forget(self, keys: Sequence[BlockKey]) -> None:
        """Blocks that turned out bad, or are not wanted any more, anywhere. They have left the arena."""
        forgotten = list(keys)
        if self.levels and forgotten:
            self.up.unwanted(forgotten)
            self._tasks.keep(asyncio.create_task(self._forget(forgotten)))

    def clear(self) -> None:
        """Forgets every block of every tier; the arena was emptied. `num_clearing` says whether it is done."""
        if self.levels:
            self.up.unwanted()
            self.num_clearing += 1
            self._tasks.keep(asyncio.create_task(self._clear()))

    def close(self) -> None:
        """Stops writing down; what was queued is lost for the tiers."""
        self._tasks.cancel()
        for level in self.levels:
            level.close()

    async def _forget(self, keys: list[BlockKey]) -> None:
        """After the puts of these blocks that are under way, or they would be back."""
        await self.down.ended(keys)
        for level in self.levels:
            future = level.submit(partial(level.tier.delete, keys))
            self._tasks.keep(asyncio.ensure_future(level.wait(future, PUT_TIMEOUT_S, None)))

    async def _clear(self) -> None:
        try:
            await self.down.ended()
            for level in self.levels:
                future = level.submit(partial(_cleared, level.tier))
                level.counts.uncleared += not await level.wait(future, CLEAR_TIMEOUT_S, False)
        finally:
            self.num_clearing -= 1


def _cleared(tier: Tier) -> bool:
    tier.clear()
    return True
