"""A TCP proxy that damages what comes back: flips, cuts, holds or replaces bytes, once each."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Proxy:
    """Forwards to a port of this host. The places count the bytes that a server sends over one connection; a fault
    happens to the first connection that reaches its place, and is over then."""

    def __init__(self, target_port: int) -> None:
        self.flip_at: int | None = None
        self.cut_at: int | None = None
        self.hold_at: int | None = None
        self.instead: bytes | None = None
        self._target_port = target_port
        self._held = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def release(self) -> None:
        """What is held goes on."""
        self._held.set()

    def close(self) -> None:
        self.release()
        for each in (self._listener, *self._sockets):
            _shut(each)
        for thread in self._threads:
            thread.join(5.0)
        for each in (self._listener, *self._sockets):
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target_port))
            self._sockets += [client, server]
            for call in (self._ask, self._answer):
                thread = threading.Thread(target=call, args=(client, server), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _ask(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(65_536):
                server.sendall(data)
        _shut(server)

    def _answer(self, client: socket.socket, server: socket.socket) -> None:
        at = 0
        with suppress(OSError):
            while data := server.recv(65_536):
                client.sendall(self._damaged(data, at))
                at += len(data)
                if self.cut_at is not None and at > self.cut_at:
                    self.cut_at = None
                    break
        _shut(client)
        _shut(server)

    def _damaged(self, data: bytes, at: int) -> bytes:
        if self.instead is not None:
            data, self.instead = self.instead, None
        if self.flip_at is not None and at <= self.flip_at < at + len(data):
            changed = bytearray(data)
            changed[self.flip_at - at] ^= 1
            data, self.flip_at = bytes(changed), None
        if self.cut_at is not None and at <= self.cut_at < at + len(data):
            data = data[: self.cut_at - at]
        if self.hold_at is not None and at <= self.hold_at < at + len(data):
            self.hold_at = None
            self._held.wait(20.0)
        return data


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
