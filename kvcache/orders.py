"""What an engine's scheduler tells its workers about the cache in one step, and what they answer.

Tensor-parallel ranks get the same orders, and each does its part of every block. Stores are answered by all ranks in
the same step; loads end when they end, so each rank's answer comes by itself (`engine/ranks.py` waits for all).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from kvcache.wire import Written

_MASK = (1 << 64) - 1


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """One block: its id in the engine, where it lies in the arena, its key; of loads the digest it must have, the
    tier that had it when it was asked for, and how many tokens of it are wanted."""

    block_id: int
    offset: int
    key: bytes
    digest: int = 0
    tier: str = ""
    num_tokens: int = 0


class Load(msgspec.Struct, frozen=True):
    """Copy these blocks from the arena into the engine, and compare. in_step: this step's forward pass computes with
    them, and waits for each layer."""

    request_id: str
    arena_id: str
    pieces: list[Piece]
    in_step: bool = False

    def ended(
        self,
        part_bytes: int,
        seconds: float,
        why: str = "",
        bad: Sequence[Written] = (),
        waited_s: float | None = None,
    ) -> Loaded:
        """What to answer. part_bytes: of one block on this rank; waited_s: None for all of the time."""
        if bad:
            why = "a block in the cache differs from what was stored"
        tokens: Counter[str] = Counter()
        for piece in self.pieces:
            tokens[piece.tier] += piece.num_tokens
        tiers = Counter(piece.tier for piece in self.pieces)
        num_blocks = len(self.pieces)
        return Loaded(
            request_id=self.request_id,
            num_blocks=num_blocks,
            num_bytes=num_blocks * part_bytes,
            seconds=seconds,
            why=why,
            bad=list(bad),
            tiers=dict(tiers),
            tokens=dict(tokens),
            in_step=self.in_step,
            waited_s=seconds if waited_s is None else waited_s,
        )


class Store(msgspec.Struct, frozen=True):
    """Copy these blocks into the arena; they are computed when this step's forward pass ends. deadline_s: monotonic,
    after which the place may be another's."""

    request_id: str
    arena_id: str
    epoch: int
    deadline_s: float
    pieces: list[Piece]


class CacheOrders(msgspec.Struct):
    """One step's orders."""

    loads: list[Load] = []
    stores: list[Store] = []


class Loaded(msgspec.Struct, frozen=True):
    """One load has ended. why: why it failed, empty if every block is in place and equal; bad: blocks that differed;
    tiers, tokens: blocks and tokens by the tier that had them; in_step: as it was ordered;
    waited_s: for how long the request did not get on."""

    request_id: str
    num_blocks: int
    num_bytes: int
    seconds: float
    why: str = ""
    bad: list[Written] = []
    tiers: dict[str, int] = {}
    tokens: dict[str, int] = {}
    in_step: bool = False
    waited_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Of all tiers."""
        return sum(self.tokens.values())

    def with_that_of(self, other: Loaded) -> Loaded:
        """The same load on two tensor-parallel ranks: in place where both parts are."""
        return msgspec.structs.replace(
            self,
            num_bytes=self.num_bytes + other.num_bytes,
            seconds=max(self.seconds, other.seconds),
            waited_s=max(self.waited_s, other.waited_s),
            why=self.why or other.why,
            bad=self.bad + [block for block in other.bad if block not in self.bad],
        )


class Stored(msgspec.Struct, frozen=True):
    """One store of one step: what is complete in the arena, and keys that could not be written."""

    request_id: str
    epoch: int
    blocks: list[Written]
    given_up: list[bytes] = []

    def keys(self) -> frozenset[bytes]:
        """Of all its blocks: what it is of."""
        return frozenset([block.key for block in self.blocks] + self.given_up)

    def with_that_of(self, other: Stored | None) -> Stored:
        """What two tensor-parallel ranks have stored of the same blocks: a block is complete where both parts are."""
        parts = {block.key: block for block in other.blocks} if other is not None else {}
        both = [
            Written(block.key, block.offset, (block.digest + parts[block.key].digest) & _MASK)
            for block in self.blocks
            if block.key in parts
        ]
        lost = self.keys() - {block.key for block in both}
        return Stored(self.request_id, self.epoch, both, sorted(lost))


class CacheResults(msgspec.Struct):
    """One step's answer. loaded: of several ranks once for each. store_seconds: that stores took of the step."""

    loaded: list[Loaded] = []
    stored: list[Stored] = []
    store_bytes: int = 0
    store_seconds: float = 0.0

    def with_those_of(self, other: CacheResults) -> CacheResults:
        """What two tensor-parallel ranks answer to the same orders."""
        theirs = {(each.request_id, each.epoch, each.keys()): each for each in other.stored}
        stored = [
            each.with_that_of(theirs.pop((each.request_id, each.epoch, each.keys()), None)) for each in self.stored
        ]
        stored += [each.with_that_of(None) for each in theirs.values()]
        return CacheResults(
            loaded=self.loaded + other.loaded,
            stored=stored,
            store_bytes=self.store_bytes + other.store_bytes,
            store_seconds=max(self.store_seconds, other.store_seconds),
        )
