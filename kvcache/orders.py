"""What an engine's scheduler tells its worker about the cache in one step, and what the worker answers."""

from __future__ import annotations

import msgspec

from kvcache.wire import Written


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
    """Copy these blocks from the arena into the engine, and compare."""

    request_id: str
    arena_id: str
    pieces: list[Piece]


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
    tiers, tokens: blocks and tokens by the tier that had them."""

    request_id: str
    num_blocks: int
    num_bytes: int
    seconds: float
    why: str = ""
    bad: list[Written] = []
    tiers: dict[str, int] = {}
    tokens: dict[str, int] = {}

    @property
    def num_tokens(self) -> int:
        """Of all tiers."""
        return sum(self.tokens.values())


class Stored(msgspec.Struct, frozen=True):
    """One store of one step: what is complete in the arena, and keys that could not be written."""

    request_id: str
    epoch: int
    blocks: list[Written]
    given_up: list[bytes] = []


class CacheResults(msgspec.Struct):
    """One step's answer. seconds: that stores took of the step."""

    loaded: list[Loaded] = []
    stored: list[Stored] = []
    store_bytes: int = 0
    store_seconds: float = 0.0
