"""A block's full identity: the engine's chained hash of its tokens, and everything that this hash leaves out.

    BlockKey = blake2b-128(chained block hash, key = namespace)
    namespace = blake2b-256(fingerprint of the KVLayout, code format, hash algorithm, adapter's content)

The engine's block hash covers the tokens before and in the block, the adapter's name, images, and the tenant's cache
salt. The layout's fingerprint covers the model's configuration (RoPE with it), its weights, dtype, shape, order and the
CPU attention's packing. Two blocks have the same key only if their bytes may stand for each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

BlockKey = bytes
"""KEY_BYTES bytes, opaque."""

KEY_BYTES = 16
TENANT_BYTES = 16
FORMAT_VERSION = 1
"""History. 1: all layers of a block one after another, K and V as the engine lays them."""


def namespace(fingerprint: str, hash_algorithm: str, adapter: bytes = b"") -> bytes:
    """32 bytes. adapter: a digest of the adapter's content, empty without one."""
    digest = hashlib.blake2b(digest_size=32)
    for part in (fingerprint.encode(), str(FORMAT_VERSION).encode(), hash_algorithm.encode(), adapter):
        digest.update(len(part).to_bytes(4, "little") + part)
    return digest.digest()


def block_key(space: bytes, block_hash: bytes) -> BlockKey:
    """The key of one block in a namespace."""
    return hashlib.blake2b(block_hash, digest_size=KEY_BYTES, key=space).digest()


def tenant_of(salt: str | None) -> bytes:
    """Who a request belongs to, from its `cache_salt`: TENANT_BYTES bytes; none for requests without a salt."""
    return hashlib.blake2b(salt.encode(), digest_size=TENANT_BYTES).digest() if salt else b""


def join_keys(keys: Iterable[BlockKey]) -> bytes:
    """Many keys as one byte string."""
    return b"".join(keys)


def split_keys(joined: bytes) -> list[BlockKey]:
    """The keys of `join_keys`. Raises ValueError if the length is no multiple of a key's."""
    if len(joined) % KEY_BYTES:
        raise ValueError(f"{len(joined)} bytes are no whole number of keys of {KEY_BYTES}")
    return [joined[at : at + KEY_BYTES] for at in range(0, len(joined), KEY_BYTES)]
