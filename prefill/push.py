"""What the sending scheduler tells its worker in one step, and what the worker answers.

Records only: they cross a process boundary in vLLM's multi-process executor.
"""

from __future__ import annotations

import msgspec

from core.handoff import Peer


class PushTarget(msgspec.Struct, frozen=True):
    """Where a hand-off goes: the receiver's blocks, in prompt order from `first_block` on.

    num_tokens: of the prompt, from its beginning, that must be in place at the end.
    """

    decode: Peer
    schemes: list[tuple[str, bytes]]
    first_block: int
    num_tokens: int
    block_ids: list[int]
    full_digest: bool


class PushChunk(msgspec.Struct, frozen=True):
    """One scheduled chunk of a prompt that is being handed off.

    num_tokens: of the prompt that will be computed when this step's forward pass has ended.
    block_ids: our own blocks of the prompt, from its first block on.
    index: counts the chunks of this prompt from 0.
    """

    handoff: str
    target: PushTarget
    num_tokens: int
    block_ids: list[int]
    index: int


class PushCommands(msgspec.Struct):
    """One step's orders. stop: hand-offs for which no further write may start. forget: boot ids of lost peers."""

    chunks: list[PushChunk] = []
    stop: list[str] = []
    forget: list[str] = []


class Pushed(msgspec.Struct, frozen=True):
    """Every write of a hand-off is done.

    num_pairs: (layer, block) pairs written; digest: over them (transport/digest.py).
    moving, last_layer, computed: unix seconds at the first write, at the last layer's last write, and at the end of the
        forward pass that held it (the rest of that layer is computed while its blocks travel).
    bytes_before_last_layer: handed to the transport before the last layer of the last chunk was computed.
    write_s, digest_s: spent in writes and in digests, in the forward pass.
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
    digest_s: float
    why_rerouted: str = ""


class PushFailed(msgspec.Struct, frozen=True):
    """A hand-off's writes failed; quiet follows when none is in flight any more."""

    handoff: str
    why: str


class PushResults(msgspec.Struct):
    """One step's answer. quiet: hand-offs without any write in flight, after stop or failure."""

    pushed: list[Pushed] = []
    failed: list[PushFailed] = []
    quiet: list[str] = []
