"""How a KV block lies in memory, and whose it is: the guard of every exchange.

Two instances may exchange blocks only if every field is equal: a block is moved as bytes, and bytes that lie
differently, or come from other weights, are silent corruption.
"""

from __future__ import annotations

import hashlib

import msgspec

PROTOCOL_VERSION = 4
"""History. 1: Accept, Decline, Cancel, Cancelled, Refused, Failed, Landed. 2: Greeting. 3: tensor-parallel ranks: an
Accept names each rank's transports and how many senders are awaited, Landed has a part for each pair of ranks. 4: a
Greeting names each rank's transports."""

HEADS_OUTERMOST = "LBHNC"
"""vLLM's name of the order layer, block, head, token, content: there a head of a block is one range of bytes."""


class KVLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The shape of one (layer, block) and the identity of the model that fills it.

    How many tensor-parallel ranks share the heads is not part of it (see transport/runs.py), so instances of different
    sizes may exchange blocks.

    num_kv_heads: of the model, over all ranks, each counted once.
    block_bytes: bytes of one block of one layer, K and V together, of all heads.
    block_size: tokens of one block.
    order: vLLM's name of the layout plus the interior packing, for example `LBHNC`.
    isa: the CPU attention's packing of the block interior (`amx`, `vec`, ...), empty on a GPU.
    model: hash over the model's configuration and weights identity (see engine/identity.py).
    """

    model: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_size: int
    block_size: int
    block_bytes: int
    order: str
    isa: str
    protocol: int = PROTOCOL_VERSION

    @property
    def head_bytes(self) -> int:
        """Of one head in one block of one layer, K and V together."""
        return self.block_bytes // self.num_kv_heads

    @property
    def has_heads_in_one_piece(self) -> bool:
        """Whether a head of a block is one range of bytes."""
        return self.order == HEADS_OUTERMOST

    @property
    def row_bytes(self) -> int:
        """Of one token of one head, K and V together; 0 where a block's interior is packed, or ordered otherwise."""
        return self.head_bytes // self.block_size if self.has_heads_in_one_piece and not self.isa else 0

    def fingerprint(self) -> str:
        """32 hex digits over every field."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:32]

    def identity_of_blocks(self, num_ranks: int) -> str:
        """32 hex digits over what decides a kept block's bytes: every field but the protocol, which is about how blocks
        travel, and how many tensor-parallel ranks have computed their parts of it."""
        fields = msgspec.structs.asdict(self) | {"protocol": 0, "num_ranks": num_ranks}
        return hashlib.sha256(msgspec.json.encode(fields)).hexdigest()[:32]

    def differences(self, other: KVLayout) -> str:
        """Each field that differs with both values, ours and then theirs; empty if blocks may be exchanged."""
        ours, theirs = msgspec.structs.asdict(self), msgspec.structs.asdict(other)
        return "; ".join(f"{k}: ours {ours[k]!r}, theirs {theirs[k]!r}" for k in ours if ours[k] != theirs[k])
