"""One client of the cache server: its words turned into the index's, the labels' and the tiers'.

Threading: the server's event loop.
"""

from __future__ import annotations

from collections.abc import Callable

from core.errors import ProtocolError
from core.handoff import Label
from kvcache import wire
from kvcache.figures import figures, label_figures
from kvcache.hierarchy import Hierarchy
from kvcache.index import Index
from kvcache.labels import Labels, Named
from kvcache.questions import Questions
from kvcache.ranges import aligned
from kvcache.wire import keys_of, tenant_of


class Client:
    """One connection. `owner` is its number, which no other has had; `more_figures` says
    what else the server does."""

    def __init__(self, index: Index, hierarchy: Hierarchy, labels: Labels, owner: int) -> None:
        self._index = index
        self._hierarchy = hierarchy
        self._labels = labels
        self._owner = owner
        self._questions = Questions(index, hierarchy, owner)
        self._send: Callable[[wire.ToClient], None] = lambda _: None
        self.more_figures: Callable[[], dict[str, float]] = dict

    def answer_to(self, send: Callable[[wire.ToClient], None]) -> None:
        """Where answers go."""
        self._send = self._questions.send = send

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
            self._questions.block_bytes = message.block_bytes
            self._hierarchy.shapes.add(message.block_bytes, message.shape)
        self._send(wire.Welcome(arena_id, arena_bytes, why))

    def hear(self, message: wire.ToServer) -> None:
        """Does what one message asks for. Raises ProtocolError if it cannot be meant so."""
        self._index.questions += isinstance(message, wire.Search | wire.SearchPartial | wire.Reserve)
        match message:
            case wire.Search():
                self._questions.search(message)
            case wire.SearchPartial():
                self._questions.search_partial(message)
            case wire.Reserve():
                self._questions.reserve(message)
            case wire.Ask():
                self._send(wire.Figures(self._figures()))
            case wire.AskLabels():
                self._send(wire.Labels(self._labels.figures()))
            case wire.Pin():
                self._send(wire.Labelled(*self._labels.pin(message.label, message.tenant, pinned=message.pinned)))
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
                self._index.abandon(self._owner, keys_of(message.keys))
            case wire.Release():
                self._questions.release(message.id)
            case wire.Touch():
                self._index.complete.leaving.touch(keys_of(message.keys))
            case wire.Bad():
                self._quarantine(message)
            case wire.Name():
                self._name(message)
            case wire.Drop():
                self._labels.clear()
                self._labels.note()
                self._index.drop(self._index.complete.keys())
                self._hierarchy.clear()

    def close(self) -> None:
        """The connection has ended: what it held comes back."""
        self._questions.close()
        self._index.forget_owner(self._owner)

    def _commit(self, message: wire.Commit) -> None:
        for block in message.blocks:
            if self._index.commit(self._owner, block.key, block.offset, block.digest):
                entry = self._index.complete.get(block.key)
                assert entry is not None, "it was committed"
                self._hierarchy.down.committed(entry)
        self._index.complete.leaving.touch([block.key for block in message.blocks])

    def _figures(self) -> dict[str, float]:
        return figures(self._index, self._hierarchy) | label_figures(self._labels) | self.more_figures()

    def _name(self, message: wire.Name) -> None:
        if not self._questions.block_bytes:
            raise ProtocolError("a client without blocks cannot name any")
        label = Label(message.label, message.ttl_s, message.pin)
        tenant, keys = tenant_of(message.tenant), tuple(keys_of(message.keys))
        self._labels.name(label, Named(tenant, keys, self._questions.block_bytes, message.num_tokens))
        self._labels.note()

    def _drop_label(self, message: wire.DropLabel) -> None:
        num_labels, keys = self._labels.drop(message.label, message.tenant)
        self._labels.note()
        if keys:
            self._hierarchy.forget(keys)
        self._send(wire.Labelled(num_labels))

    def _quarantine(self, message: wire.Bad) -> None:
        bad = [b.key for b in message.blocks if self._index.quarantine(b.key, b.offset, b.digest)]
        if bad:
            self._hierarchy.forget(bad)
