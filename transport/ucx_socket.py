"""The TCP connection beside UCX: carries the handshake, and tells of the peer's end.

Memory model: at most one greeting is kept; whoever says more is hung up on.
Threading: the transport's I/O thread alone; nothing waits.
"""

from __future__ import annotations

import errno
import socket
from contextlib import suppress

from core.errors import ConfigError, ProtocolError, TransferError
from transport.tcp import begin_to_connect, prepare
from transport.ucx_library import numeric_address
from transport.ucx_wire import Hello, Refusal, Welcome, decode_greeting, encode_greeting

BACKLOG = 128
RECEIVE_BYTES = 4096


class UcxSocket:
    """One connection, or one that is being made."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._arrived = bytearray()
        self._unsent = b""
        self._is_greeted = False
        prepare(connection)

    @classmethod
    def connect(cls, address: str) -> UcxSocket:
        """Begins to connect to tcp://host:port. Raises TransferError if that is impossible from here."""
        return cls(begin_to_connect(address))

    def fileno(self) -> int:
        return self._connection.fileno()

    def say(self, greeting: Hello | Welcome | Refusal) -> None:
        """Sends it, as soon as it can be sent (`turn`)."""
        self._unsent += encode_greeting(greeting)

    def is_waiting(self) -> bool:
        """Whether there is something that could not be sent yet."""
        return bool(self._unsent)

    def turn(self) -> Hello | Welcome | Refusal | None:
        """Sends and receives what can be; a greeting once it is whole, and only once.

        Raises TransferError if the connection has ended, ProtocolError if the other end says what it should not.
        """
        try:
            if self._unsent:
                self._unsent = self._unsent[self._connection.send(self._unsent) :]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            if error.errno != errno.ENOTCONN:  # still connecting
                raise TransferError(error.strerror or str(error)) from error
        while True:
            arrived = self._receive()
            if arrived is None:
                return None
            if not arrived:
                raise TransferError("it hung up")
            self._arrived += arrived
            if self._is_greeted:
                raise ProtocolError("it talks after its greeting")
            greeting = decode_greeting(self._arrived)
            if greeting is not None:
                self._is_greeted = True
                return greeting

    def _receive(self) -> bytes | None:
        """None if nothing is there now. Raises TransferError if nothing will come any more."""
        try:
            return self._connection.recv(RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            if error.errno == errno.ENOTCONN:
                return None
            raise TransferError(error.strerror or str(error)) from error

    def close(self) -> None:
        """What can still be sent is."""
        with suppress(OSError):
            if self._unsent:
                self._connection.send(self._unsent)
        self._connection.close()


class UcxDoor:
    """Listens on a host of ours, on its address alone, port chosen by the system. Raises ConfigError if it cannot."""

    def __init__(self, host: str) -> None:
        numeric = numeric_address(host)
        family = socket.AF_INET6 if ":" in numeric else socket.AF_INET
        try:
            self._listener = socket.create_server((numeric, 0), family=family, backlog=BACKLOG)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host!r}: {error}") from error
        self._listener.setblocking(False)
        port = self._listener.getsockname()[1]
        self.address = f"tcp://[{numeric}]:{port}" if ":" in numeric else f"tcp://{numeric}:{port}"

    def fileno(self) -> int:
        return self._listener.fileno()

    def accept(self) -> UcxSocket | None:
        """The next caller; None if there is none."""
        try:
            connection, _ = self._listener.accept()
        except OSError:  # none is left, it is gone already, or no descriptor is free
            return None
        return UcxSocket(connection)

    def close(self) -> None:
        self._listener.close()
