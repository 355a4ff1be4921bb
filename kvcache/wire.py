"""The words between a cache server and its clients, and how they lie on a unix socket.

    frame: 4 bytes little-endian length ┃ MessagePack of one tagged message

On accepting, the server first sends one byte with the arena's descriptor; then the client says Hello and gets Welcome.
Keys travel joined, KEY_BYTES each.
"""

from __future__ import annotations

import struct

import msgspec

from core.errors import ProtocolError
from kvcache.keys import TENANT_BYTES, BlockKey, split_keys
from kvcache.shape import BlockShape

VERSION = 2
"""History. 1: Hello, Search, Reserve, Commit, Abandon, Release, Touch, Bad, Drop, Ask.
2: labels (Name, Pin, DropLabel, AskLabels); partial blocks (SearchPartial); tenants in Search and Reserve."""

MAX_FRAME_BYTES = 16 << 20
LENGTH = struct.Struct("<I")


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Who connects. block_bytes: of one block over all layers; 0 for one that only asks. shape: of its blocks, for the
    codecs that need it; None if it is not known."""

    name: str
    boot_id: str
    block_bytes: int = 0
    version: int = VERSION
    shape: BlockShape | None = None


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """arena_id stays the same when a restarted server takes an arena over. why: the refusal, empty if welcome."""

    arena_id: str
    arena_bytes: int
    why: str = ""


class Slot(msgspec.Struct, frozen=True, array_like=True):
    """Where a complete block lies, the digest of what must be found there, and the tier that had it."""

    offset: int
    digest: int
    tier: str = "host"


class Grant(msgspec.Struct, frozen=True, array_like=True):
    """The block at `index` of the keys that were named may be written at `offset`."""

    index: int
    offset: int


class Search(msgspec.Struct, frozen=True, tag=True):
    """Which prefix of these blocks is there? reserve: and let me write the others. `id` names the pins it takes.

    partial: key of the partial block that ends the prompt, to be written too; its grant has the index behind the last
    key. root: what stands for the block before the first. tenant: on whose account (keys.tenant_of).
    """

    id: int
    keys: bytes
    reserve: bool = False
    partial: bytes = b""
    root: bytes = b""
    tenant: bytes = b""


class SearchPartial(msgspec.Struct, frozen=True, tag=True):
    """Which is the first of these partial blocks that is there? Tiers below the arena are asked for the first alone.
    before: the block that they follow; given where the first may be written if none is there."""

    id: int
    keys: bytes
    before: bytes = b""
    tenant: bytes = b""


class Found(msgspec.Struct, frozen=True, tag=True):
    """The prefix, and behind a whole prompt its end (Search.partial), pinned until Release; and what may be written.

    coming: so many blocks more are on their way from other tiers, and a second Found follows when they have come.
    has_partial: a partial block may follow the prefix. index: of SearchPartial, which of its keys the one slot belongs
    to.
    """

    id: int
    slots: list[Slot] = []
    grants: list[Grant] = []
    coming: int = 0
    has_partial: bool = False
    index: int = 0


class Reserve(msgspec.Struct, frozen=True, tag=True):
    """Let me write these. tenant: as Search's."""

    id: int
    keys: bytes
    tenant: bytes = b""


class Granted(msgspec.Struct, frozen=True, tag=True):
    """Which of them may be written: not those that somebody has written or is writing."""

    id: int
    grants: list[Grant] = []


class Written(msgspec.Struct, frozen=True, array_like=True):
    """One block that is complete in the arena."""

    key: bytes
    offset: int
    digest: int


class Commit(msgspec.Struct, frozen=True, tag=True):
    """These are complete: others may find them."""

    blocks: list[Written]


class Abandon(msgspec.Struct, frozen=True, tag=True):
    """These will not be written."""

    keys: bytes


class Release(msgspec.Struct, frozen=True, tag=True):
    """The copy is done; what Found(id) pinned may be evicted."""

    id: int


class Touch(msgspec.Struct, frozen=True, tag=True):
    """A chain of blocks, from its beginning, was used."""

    keys: bytes


class Bad(msgspec.Struct, frozen=True, tag=True):
    """Other bytes were found than were committed."""

    blocks: list[Written]


class Drop(msgspec.Struct, frozen=True, tag=True):
    """Forget every complete block."""


class Name(msgspec.Struct, frozen=True, tag=True):
    """`label` speaks of these blocks, of num_tokens tokens, in the order of a prompt: they need not be complete yet.
    Said twice is the same as once. ttl_s and pin: see core.handoff.Label. tenant: see keys.tenant_of."""

    label: str
    keys: bytes
    num_tokens: int = 0
    ttl_s: float = 0.0
    pin: bool = False
    tenant: bytes = b""


class Pin(msgspec.Struct, frozen=True, tag=True):
    """Pin a label's blocks, or let them go. tenant: whose label; None: everybody's of that name."""

    label: str
    pinned: bool
    tenant: bytes | None = None


class DropLabel(msgspec.Struct, frozen=True, tag=True):
    """Forget a label, and its blocks in the arena and below. tenant: as Pin's."""

    label: str
    tenant: bytes | None = None


class Labelled(msgspec.Struct, frozen=True, tag=True):
    """How many labels Pin or DropLabel has met. why: it was not done, and why."""

    num_labels: int
    why: str = ""


class AskLabels(msgspec.Struct, frozen=True, tag=True):
    """Which labels are there?"""


class LabelFigures(msgspec.Struct, frozen=True):
    """One label. blocks, num_bytes: complete in the arena now; num_blocks, num_tokens: all that it names. pinned: it
    keeps them. expires_in_s: seconds until they are dropped; None: never, they stay until they are evicted."""

    name: str
    blocks: int
    num_blocks: int
    num_tokens: int
    num_bytes: int
    pinned: bool
    expires_in_s: float | None = None
    tenant: bytes = b""


class Labels(msgspec.Struct, frozen=True, tag=True):
    """Every label, the oldest first."""

    labels: list[LabelFigures]


class Ask(msgspec.Struct, frozen=True, tag=True):
    """How is it going?"""


class Figures(msgspec.Struct, frozen=True, tag=True):
    """Counters and sizes by name; sizes in bytes, the rest in blocks."""

    values: dict[str, float]


_ByHand = Drop | Ask | Pin | DropLabel | AskLabels
ToServer = Hello | Search | SearchPartial | Reserve | Commit | Abandon | Release | Touch | Bad | Name | _ByHand
ToClient = Welcome | Found | Granted | Figures | Labelled | Labels

_BAD_INPUT = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_encoder = msgspec.msgpack.Encoder()
_server_decoder: msgspec.msgpack.Decoder[ToServer] = msgspec.msgpack.Decoder(ToServer)
_client_decoder: msgspec.msgpack.Decoder[ToClient] = msgspec.msgpack.Decoder(ToClient)


def frame(message: ToServer | ToClient) -> bytes:
    """One message as it goes over the socket."""
    body = _encoder.encode(message)
    return LENGTH.pack(len(body)) + body


def frame_bytes(head: bytes) -> int:
    """How many bytes follow a frame's head. Raises ProtocolError if it cannot be a frame."""
    (num_bytes,) = LENGTH.unpack(head)
    if not 0 < num_bytes <= MAX_FRAME_BYTES:
        raise ProtocolError(f"a frame of {num_bytes} bytes is none of the cache's")
    return int(num_bytes)


def decode_at_server(body: bytes) -> ToServer:
    """Raises ProtocolError."""
    try:
        return _server_decoder.decode(body)
    except _BAD_INPUT as error:
        raise ProtocolError(f"not a message for a cache server: {error}") from error


def decode_at_client(body: bytes) -> ToClient:
    """Raises ProtocolError."""
    try:
        return _client_decoder.decode(body)
    except _BAD_INPUT as error:
        raise ProtocolError(f"not a message of a cache server: {error}") from error


def keys_of(joined: bytes) -> list[BlockKey]:
    """The keys of a message. Raises ProtocolError."""
    try:
        return split_keys(joined)
    except ValueError as error:
        raise ProtocolError(str(error)) from error


def tenant_of(named: bytes) -> bytes:
    """The tenant of a message, empty if it names none. Raises ProtocolError."""
    if len(named) not in (0, TENANT_BYTES):
        raise ProtocolError(f"{len(named)} bytes name no tenant")
    return named
