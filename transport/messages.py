"""The control plane's messages: what two schedulers say to each other about one hand-off.

    D ── Accept ──▶ P        here are my blocks, begin             D ── Cancel ───▶ P   stop; answer with Cancelled
    D ── Decline ─▶ P        I need nothing                        P ── Cancelled ▶ D   no write can follow any more
    P ── Refused ─▶ D        I never wrote, and will not           P ── Failed ───▶ D   I gave up; no write can follow
    P ── Landed ──▶ D        every byte is in place

    D ── Greeting ▶ P        once per pair, before any hand-off: connect to me, and measure

On the wire: an `Envelope` (MessagePack), whose fingerprint is compared before the body is decoded, so that a peer
with another protocol or layout is answered clearly instead of being misread.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from core.errors import ProtocolError
from core.handoff import LONGEST_NAME, Peer
from core.layout import PROTOCOL_VERSION, KVLayout
from transport.runs import MAX_RANKS

MAX_MESSAGE_BYTES = 4 << 20
"""A control message larger than this is dropped unread (an Accept for one million tokens is under 1 MB)."""

MAX_SCHEMES = 32

_Id = Annotated[str, msgspec.Meta(max_length=LONGEST_NAME)]
_Schemes = Annotated[list[tuple[str, bytes]], msgspec.Meta(max_length=MAX_SCHEMES)]


class Accept(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """D has reserved blocks and asks P to fill them.

    num_prompt_tokens, prompt_hash: of the whole prompt as D tokenised it; P compares both with its own.
    first_block: index, in the prompt, of the first block asked for; earlier ones D holds already.
    block_ids: D's blocks, in prompt order; num_tokens: how many tokens of the prompt they complete.
    schemes: of each of D's ranks, the transports on offer with their opaque descriptions, best first.
    num_senders: ranks of P from which D awaits blocks.
    full_digest: whether every byte counts in the digest, or a few cache lines of every block.
    """

    handoff: _Id
    num_prompt_tokens: int
    prompt_hash: bytes
    first_block: int
    block_ids: list[int]
    num_tokens: int
    schemes: Annotated[list[_Schemes], msgspec.Meta(max_length=MAX_RANKS)]
    full_digest: bool
    timeout_s: float
    num_senders: int = 1


class Decline(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """D needs nothing from P for this request."""

    handoff: _Id
    why: str


class Cancel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """D gives up (client gone, deadline): P must stop writing and answer Cancelled."""

    handoff: _Id
    why: str


class Cancelled(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """P will not write for this hand-off any more: D may reuse the blocks."""

    handoff: _Id


class Refused(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """P never wrote and will not. `layout` is P's own where the layouts differ."""

    handoff: _Id
    why: str
    layout: KVLayout | None = None


class Failed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """P gave up, perhaps after writing; no write can follow any more."""

    handoff: _Id
    why: str


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one rank of P wrote to one rank of D. num_pairs counts (layer, block) pairs; the digest is over its heads of
    them."""

    sender: int
    receiver: int
    num_pairs: int
    digest: int
    scheme: str


class Landed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Every byte is in place."""

    handoff: _Id
    num_tokens: int
    num_bytes: int
    parts: Annotated[list[Part], msgspec.Meta(max_length=2 * MAX_RANKS)]
    moving_unix_s: float
    last_layer_unix_s: float


class Greeting(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """D expects to be connected to and probed by P; `schemes` as in Accept. It belongs to no hand-off."""

    schemes: Annotated[list[_Schemes], msgspec.Meta(max_length=MAX_RANKS)]
    handoff: _Id = ""


Message = Accept | Decline | Cancel | Cancelled | Refused | Failed | Landed | Greeting


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """Who sends, and under which layout; the body is decoded only where protocol and fingerprint are ours."""

    protocol: int
    fingerprint: str
    sender: Peer
    handoff: _Id
    body: msgspec.Raw


_ENVELOPE = msgspec.msgpack.Decoder(Envelope)
_BODY = msgspec.msgpack.Decoder(Message)


def encode(message: Message, sender: Peer, fingerprint: str) -> bytes:
    """One message as it travels."""
    body = msgspec.Raw(msgspec.msgpack.encode(message))
    return msgspec.msgpack.encode(Envelope(PROTOCOL_VERSION, fingerprint, sender, message.handoff, body))


def decode_envelope(wire: bytes) -> Envelope:
    """Raises ProtocolError if these bytes are no envelope."""
    try:
        return _ENVELOPE.decode(wire)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a Baton control message: {error}") from error


def decode_body(envelope: Envelope) -> Message:
    """Raises ProtocolError if the body is no message of this protocol version, or names another hand-off."""
    try:
        message: Message = _BODY.decode(envelope.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"control message from {envelope.sender.name}: {error}") from error
    if message.handoff != envelope.handoff:
        raise ProtocolError(f"control message from {envelope.sender.name}: envelope and body name other hand-offs")
    return message
