"""What the sending scheduler tells its worker in one step, and what the worker answers.

Records only: they cross a process boundary in vLLM's multi-process executor.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from core.handoff import Peer
from transport.messages import Part
from transport.runs import Lane


class PushTarget(msgspec.Struct, frozen=True):
    """Where a hand-off goes: the blocks of one of the receiver's ranks, in prompt order from `first_block` on.

    schemes: of that rank. num_tokens: of the prompt, from its beginning, that must be in place at the end.
    lane: between which ranks, and which bytes of every block.
    """

    decode: Peer
    schemes: list[tuple[str, bytes]]
    first_block: int
    num_tokens: int
    block_ids: list[int]
    full_digest: bool
    lane: Lane


class PushChunk(msgspec.Struct, frozen=True):
    """One scheduled chunk of a prompt that is being handed off, for one pair of ranks.

    num_tokens: of the prompt that will be computed when this step's forward pass has ended.
    block_ids: our own blocks of the prompt, from its first block on.
    index: counts the chunks of this prompt from 0.
    """

    handoff: str
    target: PushTarget
    num_tokens: int
    block_ids: list[int]
    index: int

    @property
    def key(self) -> tuple[str, int]:
        """What this rank knows it by."""
        return self.handoff, self.target.lane.receiver


class PushCommands(msgspec.Struct):
    """One step's orders. stop: hand-offs for which no further write may start. forget: boot ids of lost peers."""

    chunks: list[PushChunk] = []
    stop: list[str] = []
    forget: list[str] = []


class Pushed(msgspec.Struct, frozen=True):
    """Every write of a hand-off between one pair of ranks is done, or, from `whole` on, of all.

    num_pairs: (layer, block) pairs written; digest: over them (transport/digest.py).
    moving, last_layer, computed: unix seconds at the first write, at the last layer's last write, and at the end of the
        forward pass that held it (the rest of that layer is computed while its blocks travel).
    bytes_before_last_layer: handed to the transport before the last layer of the last chunk was computed.
    write_s, digest_s: spent in writes and in digests, in the forward pass.
    copy_s: spent copying, by all threads of the sending process together; 0 where others move the bytes.
    why_rerouted: why another path was given up for this one; empty if none was.
    """

    handoff: str
    num_pairs: int
    num_bytes: int
    digest: int
    scheme: str
    moving_unix_s: float
    last_layer_unix_s: float
    computed_unix_s: float
    bytes_before_last_layer: int
    write_s: float
    copy_s: float
    digest_s: float
    lane: Lane
    why_rerouted: str = ""

    def part(self) -> Part:
        """As the receiver is told."""
        return Part(self.lane.sender, self.lane.receiver, self.num_pairs, self.digest, self.scheme)


def whole(parts: Sequence[Pushed]) -> Pushed:
    """What all pairs of ranks did together, which is at least one: from the first byte to the last."""
    return msgspec.structs.replace(
        parts[0],
        num_pairs=sum(part.num_pairs for part in parts),
        num_bytes=sum(part.num_bytes for part in parts),
        digest=0,
        scheme="+".join(sorted({part.scheme for part in parts})),
        moving_unix_s=min(part.moving_unix_s for part in parts),
        last_layer_unix_s=max(part.last_layer_unix_s for part in parts),
        computed_unix_s=max(part.computed_unix_s for part in parts),
        bytes_before_last_layer=sum(part.bytes_before_last_layer for part in parts),
        write_s=max(part.write_s for part in parts),
        copy_s=sum(part.copy_s for part in parts),
        digest_s=max(part.digest_s for part in parts),
        why_rerouted="; ".join(sorted({part.why_rerouted for part in parts if part.why_rerouted})),
    )


class PushFailed(msgspec.Struct, frozen=True):
    """A hand-off's writes failed between one pair of ranks; the others do not know of it yet."""

    handoff: str
    why: str


class Quiet(msgspec.Struct, frozen=True):
    """The answer to `stop`, once: this rank has no write of the hand-off in flight any more, and starts none."""

    handoff: str
    rank: int


class PushResults(msgspec.Struct):
    """One step's answer, of one rank or of all."""

    pushed: list[Pushed] = []
    failed: list[PushFailed] = []
    quiet: list[Quiet] = []

    def with_those_of(self, other: PushResults) -> PushResults:
        """Of both."""
        return PushResults(self.pushed + other.pushed, self.failed + other.failed, self.quiet + other.quiet)
