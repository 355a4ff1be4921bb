"""What two processes of one host say to each other over the shm transport's socket, and how they know the host.

    connector ── connect ──▶ owner               uid checked on both sides (SO_PEERCRED)
    connector ◀── Hello + memfds, a side socket ── owner   SCM_RIGHTS, once
    connector ── Opening(tag), aside ──▶ owner   before the first byte is written under a tag
    connector ── Finished(tag, notice) ──▶       after the data

Every packet is one SOCK_SEQPACKET message of MessagePack. End of the connection means that the connector's mapping
is gone: the kernel closes a dying process's files only after its memory, and a closing endpoint unmaps first.

Nobody waits at the side socket: an Opening lies there until the owner hears a Finished, hears of the connection's end,
or is asked who writes. It wakes no thread, which on a busy host would take the writer's core in mid-write. Where the
side socket is full, an Opening goes the other way.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from core.errors import TransferError
from transport.base import Region
from transport.regions import MAX_NOTICE_BYTES, MAX_TAG_CHARACTERS, check_region

MAX_PACKET_BYTES = MAX_NOTICE_BYTES + 4 * MAX_TAG_CHARACTERS + 64
MAX_DESCRIPTION_BYTES = 1 << 20
MAX_MEMORIES = 64
MAX_REGIONS = 1 << 14

_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 50)]
_Offset = Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]
_Tag = Annotated[str, msgspec.Meta(max_length=MAX_TAG_CHARACTERS)]
_Notice = Annotated[bytes, msgspec.Meta(max_length=MAX_NOTICE_BYTES)]


class RegionInMemory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A region by its place in one of the owner's memories."""

    id: _Offset
    memory: Annotated[int, msgspec.Meta(ge=0, lt=MAX_MEMORIES)]
    offset: _Offset
    block_bytes: _Size
    stride: _Size
    num_blocks: _Size

    def at(self, memory_address: int) -> Region:
        """The region where its memory is mapped at this address."""
        return Region(self.id, memory_address + self.offset, self.block_bytes, self.stride, self.num_blocks)


class ShmDescription(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the owner listens, and what its memory looks like. `memories` are sizes in bytes."""

    host_id: str
    uid: int
    socket: Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
    memories: Annotated[list[_Size], msgspec.Meta(max_length=MAX_MEMORIES)]
    regions: Annotated[list[RegionInMemory], msgspec.Meta(max_length=MAX_REGIONS)]


class Opening(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """The connector is about to write under this tag."""

    tag: _Tag


class Finished(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """Everything written under this tag before is in place."""

    tag: _Tag
    notice: _Notice


Packet = Opening | Finished

_DESCRIPTION = msgspec.msgpack.Decoder(ShmDescription)
_PACKET = msgspec.msgpack.Decoder(Packet)
_ENCODER = msgspec.msgpack.Encoder()
_BAD_INPUT = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


@functools.cache
def host_id() -> str:
    """Equal in two processes exactly if they can reach each other's abstract sockets and share their users."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespaces = [str(os.stat(f"/proc/self/ns/{name}").st_ino) for name in ("net", "user")]
    return ":".join([boot_id, *namespaces])


def encode_description(description: ShmDescription) -> bytes:
    """As it travels in an Accept."""
    return _ENCODER.encode(description)


def decode_description(wire: bytes) -> ShmDescription:
    """Raises TransferError if it does not parse or a region lies outside its memory."""
    if len(wire) > MAX_DESCRIPTION_BYTES:
        raise TransferError(f"a description of {len(wire)} bytes is too large")
    try:
        description = _DESCRIPTION.decode(wire)
    except _BAD_INPUT as error:
        raise TransferError(f"not an shm description: {error}") from error
    check_places(description.memories, description.regions)
    return description


def check_places(memories: Sequence[int], regions: Sequence[RegionInMemory]) -> None:
    """Raises TransferError if a region is named twice or lies outside its memory."""
    if len({region.id for region in regions}) != len(regions):
        raise TransferError("a description names a region twice")
    for region in regions:
        check_region(region.at(0))
        end = region.offset + (region.num_blocks - 1) * region.stride + region.block_bytes
        if region.memory >= len(memories) or end > memories[region.memory]:
            raise TransferError(f"region {region.id} lies outside the described memory")


def is_reachable(wire: bytes) -> bool:
    """Whether a description is of this very host."""
    try:
        return decode_description(wire).host_id == host_id()
    except TransferError:
        return False


def encode_packet(packet: Packet) -> bytes:
    """One socket message."""
    return _ENCODER.encode(packet)


def decode_packet(wire: bytes) -> Packet | None:
    """None if it is not one: local peers are ours, yet a stray packet must not end the thread that reads them."""
    try:
        packet: Packet = _PACKET.decode(wire)
    except _BAD_INPUT:
        return None
    return packet
