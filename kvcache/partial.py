"""Partial blocks: where a prompt ends in the middle of a block, that block's first tokens under a key of their own.

    prompt A   [ block 0 ][ block 1 ][ a b c . . . ]      stored as: key(block 1, "a b c")
    prompt B   [ block 0 ][ block 1 ][ a b c d e f ][ ...  finds it: three tokens fewer to compute

The engine's own prefix cache, and others beside it, keep whole blocks alone, so that a prompt asked for again computes
up to a block less one token anew; with the 128 tokens of a block on CPUs that is most of its time to first token. The
place in the arena is a whole block's; what lies behind its tokens is undefined and read by nobody.

    key of k tokens = blake2b-128(key of the block before ┃ token ids as 4 bytes each, key = "partial")

Threading: none; pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from kvcache.keys import KEY_BYTES, BlockKey

MIN_TOKENS = 16
"""Fewer are computed in the time of a load."""

_PERSON = b"partial"


class PartialBlocks:
    """Of one prompt. root: the key that stands for what comes before its first block; keys: of its full blocks, as
    far as they are known when a method is called."""

    def __init__(self, root: BlockKey, keys: Sequence[BlockKey], token_ids: Sequence[int], block_size: int) -> None:
        self.root = root
        self._keys = keys
        self._token_ids = token_ids
        self._block_size = block_size

    @property
    def last(self) -> BlockKey:
        """The key of the prompt's own end; empty if that is a full block, or too short."""
        num_full, num_tokens = divmod(len(self._token_ids), self._block_size)
        if num_tokens < MIN_TOKENS:
            return b""
        return self._chain(num_full)[-1]

    @property
    def num_last(self) -> int:
        """Tokens of `last`."""
        return len(self._token_ids) % self._block_size

    def after(self, num_blocks: int) -> list[BlockKey]:
        """Keys of the first tokens behind so many full blocks: as many tokens as possible, then one fewer each, down to
        MIN_TOKENS."""
        return self._chain(num_blocks)[: MIN_TOKENS - 2 : -1]

    def before(self, num_blocks: int) -> BlockKey:
        """The key of the block that `after(num_blocks)` follow."""
        return self._keys[num_blocks - 1] if num_blocks else self.root

    def num_tokens(self, num_blocks: int, index: int) -> int:
        """Of the key at `index` of `after(num_blocks)`."""
        return len(self._after(num_blocks)) - index

    def _after(self, num_blocks: int) -> Sequence[int]:
        first = num_blocks * self._block_size
        return self._token_ids[first : first + self._block_size - 1]

    def _chain(self, num_blocks: int) -> list[BlockKey]:
        """Keys of the first 1, 2, ... tokens."""
        digest = hashlib.blake2b(self.before(num_blocks), digest_size=KEY_BYTES, person=_PERSON)
        result = []
        for token_id in self._after(num_blocks):
            digest.update(token_id.to_bytes(4, "little"))
            result.append(digest.copy().digest())
        return result


def root_key(space: bytes, salt: str) -> BlockKey:
    """Stands for what comes before the first block of a tenant's prompts."""
    return hashlib.blake2b(salt.encode(), digest_size=KEY_BYTES, key=space, person=_PERSON).digest()
