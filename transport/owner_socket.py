"""The connector's end of the socket on which it speaks to an owner of memory on this host (shm, cuda_ipc).

    connect ──▶ uid checked ──▶ hello (bytes and descriptors, once) ──▶ Opening(tag) aside, Finished(tag, notice), ...

Memory model: bounded; it remembers the last 4,096 tags that it announced.
Threading: connecting and the hello wait, at most 10 s each, on a thread of the caller's; afterwards nothing waits, and
the owner of this object serialises the calls.
"""

from __future__ import annotations

import collections
import os
import socket
import struct

from core.errors import TransferError
from transport.credentials import peer_pid, peer_uid
from transport.shm_wire import Opening, Packet, encode_packet

CONNECT_TIMEOUT_S = 10
MAX_TAGS_REMEMBERED = 4096
_TIMEVAL = struct.pack("ll", CONNECT_TIMEOUT_S, 0)


class OwnerSocket:
    """Raises OSError if nobody listens under this name, TransferError if it is another user."""

    def __init__(self, name: str) -> None:
        self._announced: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._side: socket.socket | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            # Time limits of the socket itself: Python's own would make connect fail at once where the backlog is full.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL)
            self._socket.connect(b"\0" + name.encode())
            if peer_uid(self._socket) != os.getuid():
                raise TransferError("the peer's socket belongs to another user")
        except BaseException:
            self._socket.close()
            raise

    @property
    def pid(self) -> int:
        """The process that listens, as the kernel knows it; 0 in another process namespace."""
        return peer_pid(self._socket)

    def hello(self, max_bytes: int, max_fds: int) -> tuple[bytes, list[int]]:
        """The owner's first packet, empty if it refused, and the descriptors of its memories. From here on nothing
        waits."""
        word, fds, _, _ = socket.recv_fds(self._socket, max_bytes, max_fds + 1, socket.MSG_CMSG_CLOEXEC)
        self._socket.setblocking(False)
        self._side = _take_socket(fds)
        return word, fds

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

    def has_announced(self, tag: str) -> bool:
        """Whether the owner knows who writes under this tag."""
        return tag in self._announced

    def announce(self, tag: str) -> bool:
        """Tells the owner, once, who writes under this tag, before the first byte: its fence if we die. False if its
        queue is full now."""
        if tag in self._announced:
            return True
        if not self._send_aside(Opening(tag)) and not self.send(Opening(tag)):
            return False
        self._announced[tag] = None
        if len(self._announced) > MAX_TAGS_REMEMBERED:
            self._announced.popitem(last=False)
        return True

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
        """Hangs up."""
        self._socket.close()
        if self._side is not None:
            self._side.close()

    def _send_aside(self, packet: Packet) -> bool:
        """Without waking the owner. False if there is no room, or no owner."""
        try:
            return self._side is not None and self._side.send(encode_packet(packet)) > 0
        except OSError:
            return False


def _take_socket(fds: list[int]) -> socket.socket | None:
    """The last descriptor, if it is a socket's; owners of an earlier version, and others, send none."""
    try:
        side = socket.socket(fileno=fds[-1])
    except (OSError, IndexError):
        return None
    fds.pop()
    side.setblocking(False)
    return side
