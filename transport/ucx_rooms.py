"""Rooms for payloads whose blocks lie apart: UCX fills one, then its bytes are scattered into the blocks.

    Rooms.lend ──▶ Room ──▶ posted to UCX, also before its payload is here ──▶ give_back, once UCX has let go of it

A room belongs to nobody's blocks, so it may be posted long before its payload comes: the payload is then copied once
on its way in, where one that comes unexpected is kept by UCX first. UCX calls a receive complete also when fewer bytes
came than were asked for, and does not say how many; so a room's last MARK_BYTES hold a mark that no sender knows, and
a payload that left it there was short. One that is short by less ends in bytes of the mark, as if its sender had sent
them: the hand-off's digest tells. No byte of an earlier payload is ever put in place.

Memory model: at most MAX_ROOMS rooms of MAX_MESSAGE_BYTES wait for payloads that may never come, and as many are kept.
Threading: the transport's I/O thread alone.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from transport.ucx_wire import MAX_MESSAGE_BYTES
from transport.ucx_worker import array

MAX_ROOMS = 32
MARK_BYTES = 16
MIN_POSTED_BYTES = 4096
"""Below it a payload is received when it is here: a mark of few bytes could be met by chance."""


class Room(NamedTuple):
    """Memory of exactly a payload's size."""

    memory: memoryview
    array: Any
    mark: bytes

    def is_short(self) -> bool:
        """Whether fewer bytes came than the room has."""
        return len(self.memory) >= MIN_POSTED_BYTES and self.memory[-MARK_BYTES:] == self.mark


class Rooms:
    """Of one transport."""

    def __init__(self) -> None:
        self._mark = os.urandom(MARK_BYTES)
        self._free: list[bytearray] = []
        self.num_lent = 0

    def lend_ahead(self, num_bytes: int) -> Room | None:
        """For a payload that may never come; None if enough are lent, or if the payload is too small to be worth it."""
        is_fit = MIN_POSTED_BYTES <= num_bytes <= MAX_MESSAGE_BYTES
        return self.lend(num_bytes) if is_fit and self.num_lent < MAX_ROOMS else None

    def lend(self, num_bytes: int) -> Room:
        """For a payload that is here, of at most MAX_MESSAGE_BYTES."""
        self.num_lent += 1
        whole = self._free.pop() if self._free else bytearray(MAX_MESSAGE_BYTES)
        memory = memoryview(whole)[:num_bytes]
        if num_bytes >= MIN_POSTED_BYTES:
            memory[-MARK_BYTES:] = self._mark
        return Room(memory, array(memory), self._mark)

    def give_back(self, room: Room) -> None:
        """UCX does not write into it any more."""
        self.num_lent -= 1
        if isinstance(room.memory.obj, bytearray) and len(self._free) < MAX_ROOMS:
            self._free.append(room.memory.obj)
