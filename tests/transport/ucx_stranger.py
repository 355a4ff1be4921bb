"""A peer of the ucx transport, for tests, that knows the token and keeps to no rule."""

from __future__ import annotations

from collections.abc import Callable

from core.errors import BatonError
from tests.poll import until
from tests.transport.memory import Owned
from transport.frames import Nack
from transport.ucx_socket import UcxSocket
from transport.ucx_wire import (
    ToReceiver,
    UcxDescription,
    Welcome,
    batch,
    control_tag,
    decode_to_sender,
    encode,
    hello,
    payload_tag,
)
from transport.ucx_worker import UcxPeer, UcxWorker, array


class Stranger:
    """One connection. Nothing of it moves on but in `progress`, `is_hung_up_on` and `close`."""

    def __init__(self, worker: UcxWorker, description: UcxDescription) -> None:
        self._worker = worker
        self._socket = UcxSocket.connect(description.address)
        self._socket.say(hello(description.token, worker.address, 7))
        welcome = until(self._socket.turn, 5.0, "the receiver says welcome")
        assert isinstance(welcome, Welcome)
        self._id = welcome.id
        self._peer = UcxPeer(worker, welcome.address, welcome.id)

    def frames(self, *frames: ToReceiver) -> None:
        self.control(batch([encode(frame) for frame in frames]))

    def control(self, message: bytes) -> None:
        content = bytearray(message)
        self._peer._send(array(content), control_tag(self._id), content)

    def payload(self, number: int, num_bytes: int) -> None:
        content = bytearray(b"\x07" * num_bytes)
        self._peer._send(array(content), payload_tag(self._id, number), content)

    def progress(self) -> None:
        self._worker.progress()

    def refusals(self) -> list[str]:
        """Why the receiver has refused frames since the last call."""
        self._worker.progress()
        control = self._worker.next_control()
        frames = (decode_to_sender(control.message) if control else None) or []
        return [frame.why for frame in frames if isinstance(frame, Nack)]

    def is_hung_up_on(self) -> bool:
        self._worker.progress()
        try:
            self._socket.turn()
        except BatonError:
            return True
        return False

    def flush(self) -> None:
        """Until everything has left."""
        until(
            lambda: self._worker.progress() or self._peer.failure() or not self._peer.is_sending(), 5.0, "all is sent"
        )

    def close(self) -> None:
        """Once everything has left."""
        self.flush()
        self.close_at_once()

    def close_at_once(self) -> None:
        self._socket.close()
        self._peer.close([], lambda: None)


def num_rooms_lent(receiver: Owned) -> int:
    """Rooms of its transport into which UCX may still write."""
    return int(receiver.transport._io._parts.receiver.rooms.num_lent)  # type: ignore[attr-defined]


def meanwhile(stranger: Stranger, condition: Callable[[], bool], what: str) -> None:
    """Waits, and lets the stranger send."""

    def holds() -> bool:
        stranger.progress()
        return condition()

    until(holds, 5.0, what)
