"""One client of the cache server: its words turned into the index's, and answers that take their time.

A Search whose blocks lie in other tiers is answered twice: at once with what the arena has and how much is coming, and
again when it has come. Other words of the same client go on meanwhile.

Threading: the server's event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import asdict

from core.errors import ProtocolError
from core.handoff import Label
from kvcache import wire
from kvcache.counts import Reason
from kvcache.hierarchy import Hierarchy
from kvcache.index import Index
from kvcache.keys import TENANT_BYTES, BlockKey, split_keys
from kvcache.labels import Labels, Named
from kvcache.ranges import aligned

MAX_SEARCHES = 256
"""Of one client at the same time that wait for other tiers; further ones get what the arena has."""


class Client:
    """One connection. `send` is where answers go; `owner` is its number, which no other has had; `more_figures` says
    what else the server does."""

    def __init__(self, index: Index, hierarchy: Hierarchy, labels: Labels, owner: int) -> None:
        self._index = index
        self._hierarchy = hierarchy
        self._labels = labels
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
        elif message.shape is not None and not message.shape.fits(message.block_bytes):
            why = f"a block of {message.name} has {message.block_bytes} bytes, which is none of its shape"
        elif aligned(message.block_bytes) > arena_bytes:
            why = f"one block of {message.name} has {message.block_bytes} bytes, the whole arena {arena_bytes}"
        else:
            self._block_bytes = message.block_bytes
            self._hierarchy.shapes.add(message.block_bytes, message.shape)
        self.send(wire.Welcome(arena_id, arena_bytes, why))

    def hear(self, message: wire.ToServer) -> None:
        """Does what one message asks for. Raises ProtocolError if it cannot be meant so."""
        self._index.questions += isinstance(message, wire.Search | wire.SearchPartial | wire.Reserve)
        match message:
            case wire.Search():
                self._search(message)
            case wire.SearchPartial():
                self._search_partial(message)
            case wire.Reserve():
                self.send(wire.Granted(message.id, self._reserve(_keys(message.keys), 0, _tenant(message.tenant))))
            case wire.Ask():
                self.send(wire.Figures(self._figures()))
            case wire.AskLabels():
                self.send(wire.Labels(self._labels.figures()))
            case wire.Pin():
                self.send(wire.Labelled(*self._labels.pin(message.label, message.tenant, pinned=message.pinned)))
                self._labels.note()
            case wire.DropLabel():
                self._drop_label(message)
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
            case wire.Name():
                self._name(message)
            case wire.Drop():
                self._labels.clear()
                self._labels.note()
                self._index.drop([entry.key for entry in self._index.entries()])
                self._hierarchy.clear()

    def close(self) -> None:
        """The connection has ended: what it held comes back."""
        for task in self._searching.values():
            task.cancel()
        self._index.forget_owner(self._owner)

    def _search(self, message: wire.Search) -> None:
        keys, end = _keys(message.keys), _keys(message.partial)
        _tenant(message.tenant)
        slots = self._pin(message.id, keys + end, [])
        rest = keys[len(slots) :]
        if not rest or not self._hierarchy.levels or not self._block_bytes or len(self._searching) >= MAX_SEARCHES:
            self._answer(message, keys, slots)
            return
        self._begin(message.id, self._search_below(message, keys, slots))

    def _begin(self, lease: int, searching: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(searching)
        self._searching[lease] = task
        task.add_done_callback(lambda _: self._searching.pop(lease, None))

    async def _search_below(self, message: wire.Search, keys: list[BlockKey], slots: list[wire.Slot]) -> None:
        """The arena has a part; the tiers below are asked for what follows."""
        keys_and_end = keys + _keys(message.partial)
        rest = keys_and_end[len(slots) :]
        levels = await self._hierarchy.find(rest)
        origins: list[str] = []
        if levels:
            self.send(wire.Found(message.id, slots, coming=len(levels)))
            origins = await self._hierarchy.bring_up(rest[: len(levels)], levels, self._block_bytes, message.tenant)
        origins = [slot.tier for slot in slots] + origins
        self._answer(message, keys, self._pin(message.id, keys_and_end, origins))

    def _pin(self, lease: int, keys: list[BlockKey], origins: list[str]) -> list[wire.Slot]:
        found = self._index.search(self._owner, lease, keys)
        tiers = [*origins, *(entry.tier for entry in found[len(origins) :])]
        return [wire.Slot(entry.offset, entry.digest, tier) for entry, tier in zip(found, tiers, strict=False)]

    def _answer(self, message: wire.Search, keys: list[BlockKey], slots: list[wire.Slot]) -> None:
        end, num_found, tenant = _keys(message.partial), len(slots), _tenant(message.tenant)
        self._index.counts.searched += len(keys)
        self._index.counts.found += min(num_found, len(keys))
        self._index.use((keys + end)[:num_found])
        self._hierarchy.used((keys + end)[:num_found])
        if num_found > len(keys):  # with the prompt's end: there is nothing more to find or to write
            self.send(wire.Found(message.id, slots))
            return
        grants = self._reserve(keys[num_found:], num_found, tenant) if message.reserve else []
        has_partial = self._index.has_partial(keys[num_found - 1] if slots else message.root)
        if end and num_found == len(keys) and self._hierarchy.levels:
            has_partial = True  # that is only likely: its place is granted when SearchPartial has not found it
        elif end and message.reserve:
            grants += self._reserve(end, len(keys), tenant, keys[-1] if keys else message.root)
        self.send(wire.Found(message.id, slots, grants, has_partial=has_partial))

    def _search_partial(self, message: wire.SearchPartial) -> None:
        keys = _keys(message.keys)
        if self._answer_partial(message.id, keys):
            return
        if keys and self._hierarchy.levels and self._block_bytes and len(self._searching) < MAX_SEARCHES:
            self._begin(message.id, self._search_partial_below(message, keys[:1]))
        else:
            self._answer_no_partial(message, keys[:1])

    async def _search_partial_below(self, message: wire.SearchPartial, keys: list[BlockKey]) -> None:
        levels = await self._hierarchy.find(keys)
        origins: list[str] = []
        if levels:
            origins = await self._hierarchy.bring_up(keys, levels, self._block_bytes, _tenant(message.tenant))
        if not origins or not self._answer_partial(message.id, keys, origins[0]):
            self._answer_no_partial(message, keys)

    def _answer_partial(self, lease: int, keys: list[BlockKey], tier: str = "host") -> bool:
        found = self._index.search_any(self._owner, lease, keys)
        if found is not None:
            index, entry = found
            self._index.use(keys[index : index + 1])
            self._hierarchy.used(keys[index : index + 1])
            self.send(wire.Found(lease, [wire.Slot(entry.offset, entry.digest, tier)], index=index))
        return found is not None

    def _answer_no_partial(self, message: wire.SearchPartial, keys: list[BlockKey]) -> None:
        grants = self._reserve(keys, 0, _tenant(message.tenant), message.before) if message.before else []
        self.send(wire.Found(message.id, grants=grants))

    def _reserve(self, keys: list[BlockKey], first: int, tenant: bytes, before: BlockKey = b"") -> list[wire.Grant]:
        if not self._block_bytes:
            raise ProtocolError("a client without blocks cannot write any")
        granted = self._index.reserve(self._owner, keys, self._block_bytes, tenant, before)
        return [wire.Grant(first + index, offset) for index, offset in granted]

    def _commit(self, message: wire.Commit) -> None:
        for block in message.blocks:
            if self._index.commit(self._owner, block.key, block.offset, block.digest):
                entry = self._index.get(block.key)
                assert entry is not None, "it was committed"
                self._hierarchy.committed(entry)
        self._index.touch([block.key for block in message.blocks])

    def _release(self, lease: int) -> None:
        """Also of a search that still waits for other tiers: it is answered with nothing, what comes is nobody's."""
        task = self._searching.pop(lease, None)
        if task is not None:
            task.cancel()
            self.send(wire.Found(lease))
        self._index.release(self._owner, lease)

    def _figures(self) -> dict[str, float]:
        return figures(self._index, self._hierarchy) | label_figures(self._labels) | self.more_figures()

    def _name(self, message: wire.Name) -> None:
        if not self._block_bytes:
            raise ProtocolError("a client without blocks cannot name any")
        label = Label(message.label, message.ttl_s, message.pin)
        keys = tuple(_keys(message.keys))
        self._labels.name(label, Named(_tenant(message.tenant), keys, self._block_bytes, message.num_tokens))
        self._labels.note()

    def _drop_label(self, message: wire.DropLabel) -> None:
        num_labels, keys = self._labels.drop(message.label, message.tenant)
        self._labels.note()
        if keys:
            self._hierarchy.forget(keys)
        self.send(wire.Labelled(num_labels))

    def _quarantine(self, message: wire.Bad) -> None:
        bad = [b.key for b in message.blocks if self._index.quarantine(b.key, b.offset, b.digest)]
        if bad:
            self._hierarchy.forget(bad)


def figures(index: Index, hierarchy: Hierarchy) -> dict[str, float]:
    """What `baton cache stats` shows: the arena's, then each tier's with its name in front."""
    usage = {f"{name}_bytes": float(value) for name, value in asdict(index.usage).items()}
    counts = {f"{name}_blocks": float(value) for name, value in asdict(index.counts).items()}
    counts |= {f"evicted_{reason.value}_blocks": float(index.reasons[reason]) for reason in Reason}
    counts["dropped_blocks"] = counts.pop("evicted_drop_blocks")
    result = {"capacity_bytes": float(index.capacity_bytes), "blocks": float(len(index))} | usage | counts
    result["questions"] = float(index.questions)
    result |= {"tenants": float(index.num_tenants), "clearing": float(hierarchy.num_clearing)}
    for level in hierarchy.levels:
        held = level.tier.figures()
        values = {"blocks": held.blocks, "bytes": held.num_bytes, "evicted": held.evicted, "corrupt": held.corrupt}
        values["encoded_bytes"] = held.encoded_bytes
        values |= asdict(level.counts) | {"bypassed": int(level.is_bypassed)} | held.more
        result |= {f"{level.tier.name}_{name}": float(value) for name, value in values.items()}
    return result


def label_figures(labels: Labels) -> dict[str, float]:
    """What `baton cache stats` shows of them."""
    values = {"labels": len(labels), "labels_refused": labels.refused, "labels_unpinned": labels.unpinned}
    values["labels_unsaved"] = int(labels.unsaved)
    return {name: float(value) for name, value in values.items()}


def _keys(joined: bytes) -> list[BlockKey]:
    try:
        return split_keys(joined)
    except ValueError as error:
        raise ProtocolError(str(error)) from error


def _tenant(named: bytes) -> bytes:
    if len(named) not in (0, TENANT_BYTES):
        raise ProtocolError(f"{len(named)} bytes name no tenant")
    return named
