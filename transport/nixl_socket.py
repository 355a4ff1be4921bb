"""One connection between two NIXL transports: whole frames over TCP, without ever waiting.

Memory model: what the other end does not take waits in `_outbox`, what came incompletely in `_inbox`; both are bounded,
and who exceeds a bound is hung up on.
Threading: the transport's thread alone.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import suppress

from core.errors import TransferError
from transport.nixl_wire import frame_body, frame_bytes
from transport.tcp import begin_to_connect, prepare

MAX_OUTBOX_BYTES = 1 << 20
RECEIVE_BYTES = 256 << 10
_SILENCE = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)


class NixlSocket:
    """A connection, or one that is being made. `is_silent`: it ended because the other host answers no more."""

    def __init__(self, connection: socket.socket, max_frame_bytes: int) -> None:
        self._connection = connection
        self._max_frame_bytes = max_frame_bytes
        self._outbox = bytearray()
        self._inbox = bytearray()
        self.is_silent = False
        prepare(connection)

    @classmethod
    def connecting(cls, address: str, max_frame_bytes: int) -> NixlSocket:
        """Begins to connect to tcp://host:port. Raises TransferError if that is impossible from here."""
        return cls(begin_to_connect(address), max_frame_bytes)

    def fileno(self) -> int:
        return self._connection.fileno()

    def connect_error(self) -> str:
        """Why connecting failed, once the socket is writable; empty if it is connected."""
        code = self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return errno.errorcode.get(code, str(code)) if code else ""

    def send(self, frame: bytes) -> None:
        """Raises TransferError if the connection has ended or the other end does not read."""
        self._outbox += frame
        self.flush()
        if len(self._outbox) > MAX_OUTBOX_BYTES + self._max_frame_bytes:
            raise TransferError("the peer does not read what it is told")

    def flush(self) -> None:
        """Sends what waits. Raises TransferError if the connection has ended."""
        try:
            while self._outbox:
                del self._outbox[: self._connection.send(self._outbox)]
        except BlockingIOError:
            return
        except OSError as error:
            raise self._ended(error) from error

    def wants_to_write(self) -> bool:
        """Whether something waits for the other end."""
        return bool(self._outbox)

    def limit(self, max_frame_bytes: int) -> None:
        """From now on no frame may be larger."""
        self._max_frame_bytes = max_frame_bytes

    def receive(self) -> Iterator[bytes]:
        """Bodies of the frames that are complete. Raises TransferError after the last one if the connection has
        ended, or if a frame is too large."""
        try:
            arrived = self._connection.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            raise self._ended(error) from error
        if not arrived:
            raise TransferError("the peer hung up")
        self._inbox += arrived
        while (size := frame_bytes(self._inbox)) is not None:
            if size > self._max_frame_bytes:
                raise TransferError(f"a frame of {size} bytes is larger than {self._max_frame_bytes}")
            if len(self._inbox) < size:
                return
            frame = bytes(self._inbox[:size])
            del self._inbox[:size]
            yield frame_body(frame)

    def say_goodbye(self) -> None:
        """Nothing more comes from us; the other end may answer by hanging up."""
        self._outbox.clear()
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    def has_ended(self) -> bool:
        """Whether the other end has hung up; what it still says is thrown away."""
        try:
            return not self._connection.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return False
        except OSError as error:
            self._ended(error)
            return True

    def close(self) -> None:
        """May be called again."""
        self._connection.close()

    def _ended(self, error: OSError) -> TransferError:
        self.is_silent = self.is_silent or error.errno in _SILENCE
        return TransferError(f"the peer hung up: {error}")
