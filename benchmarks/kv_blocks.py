"""Keys and values as blocks of the KV cache, laid as vLLM's CPU attention lays them, and back.

    one layer, one head:   keys (head_size, tokens): each channel's tokens in a row ┃ values (tokens, head_size)

Memory model: every call makes new arrays. Threading: pure functions.
"""

from __future__ import annotations

import msgspec
import numpy as np

from kvcache.elements import Floats, read_floats, write_floats
from kvcache.shape import ELEMENT_BYTES, BlockShape, Dtype

BLOCK_SIZE = 128
"""Tokens, vLLM's default on CPUs."""


class BlockKind(msgspec.Struct, frozen=True):
    """What a model's blocks of one dtype look like."""

    dtype: Dtype
    num_layers: int
    num_heads: int
    head_size: int

    @property
    def shape(self) -> BlockShape:
        return BlockShape(self.dtype, self.num_layers, BLOCK_SIZE * self.head_size)

    @property
    def num_bytes(self) -> int:
        """Of a block."""
        return self.num_layers * self.num_heads * 2 * BLOCK_SIZE * self.head_size * ELEMENT_BYTES[self.dtype]


def blocks_of(keys: Floats, values: Floats, kind: BlockKind) -> list[bytes]:
    """keys, values: (layers, heads, tokens, head_size), a whole number of blocks; rounded to the dtype."""
    blocks = []
    for at in range(0, keys.shape[2], BLOCK_SIZE):
        part = slice(at, at + BLOCK_SIZE)
        halves = (keys[:, :, part].swapaxes(2, 3), values[:, :, part])
        flat = [half.reshape(kind.num_layers, kind.num_heads, -1) for half in halves]
        block = bytearray(kind.num_bytes)
        write_floats(np.concatenate(flat, axis=2).reshape(-1), kind.dtype, memoryview(block))
        blocks.append(bytes(block))
    return blocks


def keys_and_values(blocks: list[bytes], kind: BlockKind) -> tuple[Floats, Floats]:
    """What `blocks_of` was given, rounded."""
    keys, values = [], []
    for block in blocks:
        halves = read_floats(memoryview(block), kind.dtype).reshape(kind.num_layers, kind.num_heads, 2, -1)
        keys.append(halves[:, :, 0].reshape(kind.num_layers, kind.num_heads, kind.head_size, BLOCK_SIZE).swapaxes(2, 3))
        values.append(halves[:, :, 1].reshape(kind.num_layers, kind.num_heads, BLOCK_SIZE, kind.head_size))
    return np.concatenate(keys, axis=2), np.concatenate(values, axis=2)
