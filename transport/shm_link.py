"""A connected owner of shared memory, as its connector sees it: memories mapped, one socket.

Memory model: the owner's memories are mapped whole and populated; `close` unmaps them before it hangs up, so that the
connection's end is a fence for the owner.
Threading: constructing it waits (for the owner's thread, and 0.3 s per GiB to populate) and is done on a thread of
its own; everything else is called under the endpoint's lock and never waits.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct

from core.errors import TransferError
from transport.base import Region
from transport.mapping import Mapping, map_foreign
from transport.shm_listener import peer_uid
from transport.shm_wire import MAX_MEMORIES, Packet, ShmDescription, encode_packet

CONNECT_TIMEOUT_S = 10
_TIMEVAL = struct.pack("ll", CONNECT_TIMEOUT_S, 0)


class ShmLink:
    """Raises TransferError if the owner cannot be reached or its memory is not as described."""

    def __init__(self, description: ShmDescription) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._memories: list[Mapping] = []
        try:
            fds = self._fetch(description)
            try:
                self._map(fds, description.memories)
            finally:
                for fd in fds:
                    os.close(fd)
        except OSError as error:
            self.close()
            raise TransferError(f"cannot reach the peer's shared memory: {error}") from error
        except TransferError:
            self.close()
            raise
        self._socket.setblocking(False)
        self.regions: dict[int, Region] = {
            region.id: region.at(self._memories[region.memory].address) for region in description.regions
        }

    @property
    def fd(self) -> int:
        """Of the connection."""
        return self._socket.fileno()

    def is_alive(self) -> bool:
        """False once the owner has hung up or died."""
        try:
            return self._socket.recv(1) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def send(self, packet: Packet) -> bool:
        """False if the owner's queue is full now. Raises TransferError if the owner is gone."""
        try:
            self._socket.send(encode_packet(packet))
        except BlockingIOError:
            return False
        except OSError as error:
            raise TransferError(f"the peer hung up: {error}") from error
        return True

    def close(self) -> None:
        """Unmaps, then hangs up."""
        for memory in self._memories:
            memory.close()
        self._socket.close()

    def _fetch(self, description: ShmDescription) -> list[int]:
        # Time limits of the socket itself: Python's own would make connect fail at once where the backlog is full.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL)
        self._socket.connect(b"\0" + description.socket.encode())
        if peer_uid(self._socket) != os.getuid():
            raise TransferError("the peer's socket belongs to another user")
        hello, fds, _, _ = socket.recv_fds(self._socket, 16, MAX_MEMORIES, socket.MSG_CMSG_CLOEXEC)
        if not hello or len(fds) != len(description.memories):
            with contextlib.suppress(OSError):
                for fd in fds:
                    os.close(fd)
            raise TransferError("the peer refused, or described other memory than it has")
        return fds

    def _map(self, fds: list[int], sizes: list[int]) -> None:
        for fd, num_bytes in zip(fds, sizes, strict=True):
            memory = map_foreign(fd, num_bytes)
            self._memories.append(memory)
            memory.populate()
