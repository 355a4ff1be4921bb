"""A TCP relay between two peers, for tests: it listens in, and can stop forwarding while both connections stay open."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading

CHUNK_BYTES = 1 << 16


class Relay:
    """Forwards new connections to `target_port` of this host, until `close`; `seen` is all that went by."""

    def __init__(self, port: int) -> None:
        self.target_port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.seen = bytearray()
        self.is_forwarding = threading.Event()
        self.is_forwarding.set()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._is_closing.set()
        self._thread.join(5)
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()

    def _run(self) -> None:
        while not self._is_closing.is_set():
            for key, _ in self._selector.select(0.02):
                assert isinstance(key.fileobj, socket.socket)
                if key.fileobj is self._listener:
                    self._accept()
                elif self.is_forwarding.is_set():
                    self._forward(key.fileobj, key.data)
                else:  # the kernel's buffers take what still comes, and acknowledge it
                    self._is_closing.wait(0.02)

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        try:
            far = socket.create_connection(("127.0.0.1", self.target_port), 5)
        except OSError:
            near.close()
            return
        self._selector.register(near, selectors.EVENT_READ, far)
        self._selector.register(far, selectors.EVENT_READ, near)

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        try:
            chunk = source.recv(CHUNK_BYTES)
            self.seen += chunk
            target.sendall(chunk)
        except OSError:
            chunk = b""
        if not chunk:
            for each in (source, target):
                with contextlib.suppress(KeyError, ValueError):
                    self._selector.unregister(each)
                each.close()
