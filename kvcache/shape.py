"""How the numbers lie in a block, as far as a codec must know, and which shapes a server's clients have named.

    block:   layer 0 ┃ layer 1 ┃ ... ┃ layer L-1
    layer:   head 0: keys │ values ┃ head 1: keys │ values ┃ ...        `head_elements` numbers each

Within such a run of one head's keys (or values) the engine may pack numbers in any order: a scale for the run is right
for every packing. Where a run ends is known for vLLM's CPU attention; other engines' shapes are not named.

Threading: `KnownShapes` is told by the server's event loop and asked by tiers' threads; each call is one operation on a
dictionary.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

MAX_SIZES = 1024
"""Sizes of blocks that are remembered; blocks of further ones have no known shape."""

Dtype = Literal["bfloat16", "float16", "float32"]
ELEMENT_BYTES: dict[Dtype, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
Count = Annotated[int, msgspec.Meta(ge=1, lt=2**32)]


class BlockShape(msgspec.Struct, frozen=True):
    """head_elements: numbers of one head's keys (or values) in one layer of one block, one after another."""

    dtype: Dtype
    num_layers: Count
    head_elements: Count

    @property
    def head_bytes(self) -> int:
        """Of one head's keys, or values, in one layer."""
        return self.head_elements * ELEMENT_BYTES[self.dtype]

    def fits(self, block_bytes: int) -> bool:
        """Whether a block of so many bytes is a whole number of such heads in every layer."""
        return block_bytes > 0 and block_bytes % (self.num_layers * self.head_bytes) == 0


class KnownShapes:
    """The shape of blocks by their size, as clients have named it. Two clients whose blocks have one size and different
    shapes, or one of which names none, leave that size without a shape for good."""

    def __init__(self) -> None:
        self._by_size: dict[int, BlockShape | None] = {}

    def add(self, block_bytes: int, shape: BlockShape | None) -> None:
        """Before the first block of that client is complete."""
        if len(self._by_size) < MAX_SIZES or block_bytes in self._by_size:
            known = self._by_size.setdefault(block_bytes, shape)
            if known != shape:
                self._by_size[block_bytes] = None

    def of(self, block_bytes: int) -> BlockShape | None:
        """None if it is not known for certain."""
        return self._by_size.get(block_bytes)
