"""Room for the payloads that a zmq link gathers: taken for a frame, free again when the frame was answered.

A new megabyte costs more than gathering into it: the kernel zeroes its pages one by one. An answered frame has left
ZMQ, so its room can be filled again; where a link fails without answers, the room is dropped with it.

Memory model: at most the link's window is lent, and at most MAX_FREE_BYTES are kept. Threading: the I/O thread alone.
"""

from __future__ import annotations

MAX_FREE_BYTES = 16 << 20


class FrameBuffers:
    """Of one link."""

    def __init__(self) -> None:
        self._lent: dict[int, bytearray] = {}
        self._free: list[bytearray] = []
        self._free_bytes = 0

    def lend(self, number: int, num_bytes: int) -> memoryview:
        """Room for frame `number`, of exactly that size; what it holds is undefined."""
        room = self._free.pop() if self._free else bytearray()
        self._free_bytes -= len(room)
        if len(room) < num_bytes:
            room = bytearray(num_bytes)
        self._lent[number] = room
        return memoryview(room)[:num_bytes]

    def answered(self, number: int) -> None:
        """Frame `number` has arrived or never will, and nobody reads its payload any more."""
        room = self._lent.pop(number, None)
        if room is not None and self._free_bytes + len(room) <= MAX_FREE_BYTES:
            self._free.append(room)
            self._free_bytes += len(room)
