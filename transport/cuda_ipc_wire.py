"""What two processes of one host tell each other about GPU memory: the description that travels, and the hello.

    description (over the control plane, untrusted):  who and where, sizes, regions: nothing with which to reach memory
    hello (over the owner's socket, same user only):   the IPC handles

After the hello both speak as over shm: Opening(tag) before the first byte, Finished(tag, notice) behind the data
(transport/shm_wire.py). End of the connection means here as there that the connector's mapping is gone.
"""

from __future__ import annotations

import functools
import os
from typing import Annotated

import msgspec

from core.errors import TransferError
from transport.device import MAX_HANDLE_BYTES, Exported
from transport.shm_wire import RegionInMemory, check_places, host_id

VERSION = 1
MAX_MEMORIES = 256
"""Allocations, not regions: an engine has one per layer at most."""
MAX_HELLO_BYTES = MAX_MEMORIES * (MAX_HANDLE_BYTES + 200)
MAX_DESCRIPTION_BYTES = 1 << 20

_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 50)]


class CudaIpcDescription(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the owner listens, and what its memory looks like. `memories` are sizes in bytes, `devices` the GPU of each
    by its own name."""

    cuda_ipc: int
    host: str
    uid: int
    socket: Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
    devices: Annotated[list[str], msgspec.Meta(max_length=MAX_MEMORIES)]
    memories: Annotated[list[_Size], msgspec.Meta(max_length=MAX_MEMORIES)]
    regions: Annotated[list[RegionInMemory], msgspec.Meta(max_length=1 << 14)]


class _Versioned(msgspec.Struct):
    cuda_ipc: int


_DESCRIPTION = msgspec.msgpack.Decoder(CudaIpcDescription)
_VERSIONED = msgspec.msgpack.Decoder(_Versioned)
_HELLO = msgspec.msgpack.Decoder(list[Exported])
_ENCODER = msgspec.msgpack.Encoder()
_BAD_INPUT = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


@functools.cache
def process_host_id() -> str:
    """Equal in two processes that can reach each other's sockets and see each other's process numbers: CUDA IPC fails
    between containers that do not share the process namespace."""
    return f"{host_id()}:{os.stat('/proc/self/ns/pid').st_ino}"


def encode_description(description: CudaIpcDescription) -> bytes:
    """As it travels in an Accept."""
    return _ENCODER.encode(description)


def decode_description(wire: bytes) -> CudaIpcDescription:
    """Raises TransferError if it does not parse, speaks another version, or a region lies outside its memory."""
    if len(wire) > MAX_DESCRIPTION_BYTES:
        raise TransferError(f"a description of {len(wire)} bytes is too large")
    try:
        version = _VERSIONED.decode(wire).cuda_ipc
        if version != VERSION:
            raise TransferError(f"the peer speaks version {version} of cuda_ipc, we {VERSION}: install the same Baton")
        description = _DESCRIPTION.decode(wire)
    except _BAD_INPUT as error:
        raise TransferError(f"not a cuda_ipc description: {error}") from error
    if len(description.devices) != len(description.memories):
        raise TransferError("a cuda_ipc description names a GPU for some memories only")
    check_places(description.memories, description.regions)
    return description


def check_reachable(description: CudaIpcDescription) -> None:
    """Raises TransferError, with the remedy, if the peer's memory cannot be mapped from this process."""
    if description.host != process_host_id():
        raise TransferError(
            "the peer's GPU memory is on another host, or in a container with network, user or process numbers of its "
            "own: start both containers with --network, --userns and --pid in common"
        )
    if description.uid != os.getuid():
        raise TransferError(f"the peer runs as user {description.uid}, we as {os.getuid()}: run both as the same user")


def is_reachable(wire: bytes) -> bool:
    """Whether a description is of this very host, user and process namespace. Whether the two GPUs reach each other is
    found out by connecting: asking would start CUDA here."""
    try:
        check_reachable(decode_description(wire))
    except TransferError:
        return False
    return True


def encode_hello(memories: list[Exported]) -> bytes:
    """One socket message."""
    return _ENCODER.encode(memories)


def decode_hello(wire: bytes, description: CudaIpcDescription) -> list[Exported]:
    """Raises TransferError unless the memories are those described."""
    try:
        memories = _HELLO.decode(wire)
    except _BAD_INPUT as error:
        raise TransferError(f"the peer refused, or does not speak cuda_ipc: {error}") from error
    described = list(zip(description.devices, description.memories, strict=True))
    if [(memory.device, memory.num_bytes) for memory in memories] != described:
        raise TransferError("the peer has other memory than it described")
    return memories
