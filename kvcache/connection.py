"""One client of the cache server: its words turned into the index's, and answers that take their time.

A Search whose blocks lie in other tiers is answered twice: at once with what the arena has and how much is coming, and
again when it has come. Other words of the same client go on meanwhile.

Threading: the server's event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict

from core.errors import ProtocolError
from kvcache import wire
from kvcache.hierarchy import Hierarchy
from kvcache.index import Index
from kvcache.keys import BlockKey, split_keys
from kvcache.ranges import aligned

MAX_SEARCHES = 256
"""Of one client at the same time that wait for other tiers; further ones get what the arena has."""


class Client:
    """One connection. `send` is where answers go; `owner` is its number, which no other has had; `more_figures` says
    what else the server does."""

    def __init__(self, index: Index, hierarchy: Hierarchy, owner: int) -> None:
        self._index = index
        self._hierarchy = hierarchy
        self._owner = owner
        self._block_bytes = 0
        self._searching: dict[int, asyncio.Task[None]] = {}
        self.send: Callable[[wire.ToClient], None] = lambda _: None
        self.more_figures: Callable[[], dict[str, float]] = dict

    def greet(self, message: wire.ToServer, arena_id: str) -> None:
        """Answers the first message. Raises ProtocolError if it is no greeting."""
        if not isinstance(message, wire.Hello):
            raise ProtocolError("the first message must be Hello")
        why, arena_bytes = "", self._index.capacity_bytes
        if message.version != wire.VERSION:
            why = f"this cache server speaks version {wire.VERSION}, {message.name} {message.version}"
        elif aligned(message.block_bytes) > arena_bytes:
            why = f"one block of {message.name} has {message.block_bytes} bytes, the whole arena {arena_bytes}"
        else:
            self._block_bytes = message.block_bytes
        self.send(wire.Welcome(arena_id, arena_bytes, why))

    def hear(self, message: wire.ToServer) -> None:
        """Does what one message asks for. Raises ProtocolError if it cannot be meant so."""
        match message:
            case wire.Search():
                self._search(message)
            case wire.Reserve():
                self.send(wire.Granted(message.id, self._reserve(_keys(message.keys), 0)))
            case wire.Ask():
                self.send(wire.Figures(figures(self._index, self._hierarchy) | self.more_figures()))
            case wire.Hello():
                raise ProtocolError("Hello was said already")
            case _:
                self._obey(message)

    def _obey(self, message: wire.ToServer) -> None:
        """Messages without an answer."""
        match message:
            case wire.Commit():
                self._commit(message)
            case wire.Abandon():
                self._index.abandon(self._owner, _keys(message.keys))
            case wire.Release():
                self._release(message.id)
            case wire.Touch():
                self._index.touch(_keys(message.keys))
            case wire.Bad():
                self._quarantine(message)
            case wire.Drop():
                keys = self._index.keys()
                self._index.drop(keys)
                self._hierarchy.forget(keys)

    def close(self) -> None:
        """The connection has ended: what it held comes back."""
        for task in self._searching.values():
            task.cancel()
        self._index.forget_owner(self._owner)

    def _search(self, message: wire.Search) -> None:
        keys = _keys(message.keys)
        slots = self._pin(message.id, keys, [])
        rest = keys[len(slots) :]
        if not rest or not self._hierarchy.levels or not self._block_bytes or len(self._searching) >= MAX_SEARCHES:
            self._answer(message, keys, slots)
            return
        task = asyncio.create_task(self._search_below(message, keys, slots))
        self._searching[message.id] = task
        task.add_done_callback(lambda _: self._searching.pop(message.id, None))

    async def _search_below(self, message: wire.Search, keys: list[BlockKey], slots: list[wire.Slot]) -> None:
        """The arena has a part; the tiers below are asked for what follows."""
        rest = keys[len(slots) :]
        levels = await self._hierarchy.find(rest)
        origins: list[str] = []
        if levels:
            self.send(wire.Found(message.id, slots, coming=len(levels)))
            origins = await self._hierarchy.bring_up(rest[: len(levels)], levels, self._block_bytes)
        origins = ["host"] * len(slots) + origins
        self._answer(message, keys, self._pin(message.id, keys, origins))

    def _pin(self, lease: int, keys: list[BlockKey], origins: list[str]) -> list[wire.Slot]:
        found = self._index.search(self._owner, lease, keys)
        tiers = [*origins, *["host"] * len(found)]
        return [wire.Slot(entry.offset, entry.digest, tier) for entry, tier in zip(found, tiers, strict=False)]

    def _answer(self, message: wire.Search, keys: list[BlockKey], slots: list[wire.Slot]) -> None:
        self._index.counts.searched += len(keys)
        self._index.counts.found += len(slots)
        grants = self._reserve(keys[len(slots) :], len(slots)) if message.reserve else []
        self.send(wire.Found(message.id, slots, grants))

    def _reserve(self, keys: list[BlockKey], first: int) -> list[wire.Grant]:
        if not self._block_bytes:
            raise ProtocolError("a client without blocks cannot write any")
        granted = self._index.reserve(self._owner, keys, self._block_bytes)
        return [wire.Grant(first + index, offset) for index, offset in granted]

    def _commit(self, message: wire.Commit) -> None:
        for block in message.blocks:
            if self._index.commit(self._owner, block.key, block.offset, block.digest):
                entry = self._index.get(block.key)
                assert entry is not None, "it was committed"
                self._hierarchy.write_down(entry)
        self._index.touch([block.key for block in message.blocks])

    def _release(self, lease: int) -> None:
        """Also of a search that still waits for other tiers: it is answered with nothing, what comes is nobody's."""
        task = self._searching.pop(lease, None)
        if task is not None:
            task.cancel()
            self.send(wire.Found(lease))
        self._index.release(self._owner, lease)

    def _quarantine(self, message: wire.Bad) -> None:
        bad = [b.key for b in message.blocks if self._index.quarantine(b.key, b.offset, b.digest)]
        if bad:
            self._hierarchy.forget(bad)


def figures(index: Index, hierarchy: Hierarchy) -> dict[str, float]:
    """What `baton cache stats` shows: the arena's, then each tier's with its name in front."""
    usage = {f"{name}_bytes": float(value) for name, value in asdict(index.usage).items()}
    counts = {f"{name}_blocks": float(value) for name, value in asdict(index.counts).items()}
    result = {"capacity_bytes": float(index.capacity_bytes), "blocks": float(len(index))} | usage | counts
    for level in hierarchy.levels:
        held = level.tier.figures()
        values = {"blocks": held.blocks, "bytes": held.num_bytes, "evicted": held.evicted, "corrupt": held.corrupt}
        values |= asdict(level.counts) | {"bypassed": int(level.is_bypassed)} | held.more
        result |= {f"{level.tier.name}_{name}": float(value) for name, value in values.items()}
    return result


def _keys(joined: bytes) -> list[BlockKey]:
    try:
        return split_keys(joined)
    except ValueError as error:
        raise ProtocolError(str(error)) from error
