"""What the owner of shared memory hears of its writers: landings by tag, and words that came before their landing.

    Writer (one per connection) ──▶ Letterbox ──▶ ShmLanding (one per tag)

Memory model: landings are held by whoever opened them and only weakly here, so that a closed landing still learns
that its writer has hung up. Words for tags without a landing wait, bounded, until `open` asks for them.
Threading: the listener's thread delivers, the engine's opens and polls, and reads the side sockets when it must know
who writes; the letterbox's lock guards what they share.
"""

from __future__ import annotations

import collections
import socket
import threading
import weakref

from core.errors import TransferError
from transport.landing import MAX_NOTICES
from transport.shm_wire import MAX_PACKET_BYTES, Opening, Packet, decode_packet

MAX_EARLY_TAGS = 1024
MAX_EARLY_PACKETS = 16
OPENINGS_PER_TURN = 4096
"""More than a side socket holds (some 280, by the kernel's default)."""


class Writer:
    """One connection. side: where it announces itself. `has_hung_up`: its mapping is gone."""

    def __init__(self, connection: socket.socket, side: socket.socket) -> None:
        self.connection = connection
        self.side = side
        self.has_hung_up = False

    def close(self) -> None:
        self.connection.close()
        self.side.close()


class ShmLanding:
    """A `transport.base.Landing` that sees notices but not bytes."""

    def __init__(self, box: Letterbox) -> None:
        self._box = box
        self._notices: collections.deque[bytes] = collections.deque()
        self._writers: set[Writer] = set()
        self.is_open = True

    def poll(self) -> list[bytes]:
        with self._box.lock:
            notices = list(self._notices)
            self._notices.clear()
        return notices

    def num_written(self) -> int | None:
        return None

    def digest(self) -> int | None:
        return None

    def peer_gone(self) -> bool:
        with self._box.lock:
            if not self._are_all_gone():
                return False
            self._box.hear_openings()
            return self._are_all_gone()

    def has_writer(self) -> bool:
        with self._box.lock:
            if not self._writers:
                self._box.hear_openings()
            return bool(self._writers)

    def close(self) -> bool:
        """False: a mapped memory can be written until its writer says that it stopped, or is gone."""
        self.is_open = False
        return False

    def take(self, writer: Writer, packet: Packet) -> bool:
        """False if too many notices wait. Under the letterbox's lock."""
        self._writers.add(writer)
        if isinstance(packet, Opening) or not self.is_open:
            return True
        if len(self._notices) >= MAX_NOTICES:
            return False
        self._notices.append(packet.notice)
        return True

    def _are_all_gone(self) -> bool:
        return bool(self._writers) and all(writer.has_hung_up for writer in self._writers)


class Letterbox:
    """Landings by tag, and the words that came before their landing. malformed: packets of side sockets that were
    dropped."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.writers: set[Writer] = set()
        self.malformed = 0
        self._landings: weakref.WeakValueDictionary[str, ShmLanding] = weakref.WeakValueDictionary()
        self._early: collections.OrderedDict[str, list[tuple[Writer, Packet]]] = collections.OrderedDict()

    def open(self, tag: str) -> ShmLanding:
        """Raises TransferError if the tag is open already."""
        with self.lock:
            self.hear_openings()  # those of an earlier landing of this name are not for the new one alone
            known = self._landings.get(tag)
            if known is not None and known.is_open:
                raise TransferError(f"a landing is open already under tag {tag!r}")
            landing = ShmLanding(self)
            self._landings[tag] = landing
            for writer, packet in self._early.pop(tag, []):
                landing.take(writer, packet)
        return landing

    def deliver(self, writer: Writer, packet: Packet) -> bool:
        """False if the packet had to be dropped. What lies at the side socket is heard behind it: a notice is waited
        for."""
        with self.lock:
            is_delivered = self._deliver(writer, packet)
        with self.lock:
            self._hear_openings_of(writer)
        return is_delivered

    def hear_openings(self) -> None:
        """What lies at the side sockets. Under the lock."""
        for writer in self.writers:
            self._hear_openings_of(writer)

    def add(self, writer: Writer) -> None:
        with self.lock:
            self.writers.add(writer)

    def remove(self, writer: Writer) -> None:
        """Its connection has ended."""
        with self.lock:
            self._hear_openings_of(writer)
            self.writers.discard(writer)
            writer.has_hung_up = True

    def _hear_openings_of(self, writer: Writer) -> None:
        for _ in range(OPENINGS_PER_TURN):
            try:
                wire = writer.side.recv(MAX_PACKET_BYTES + 1)
            except OSError:  # nothing there; or the peer is gone, of which its connection tells
                return
            if not wire:
                return
            packet = decode_packet(wire) if len(wire) <= MAX_PACKET_BYTES else None
            if not isinstance(packet, Opening) or not self._deliver(writer, packet):
                self.malformed += 1

    def _deliver(self, writer: Writer, packet: Packet) -> bool:
        landing = self._landings.get(packet.tag)
        if landing is not None:
            return landing.take(writer, packet)
        waiting = self._early.setdefault(packet.tag, [])
        waiting.append((writer, packet))
        while len(self._early) > MAX_EARLY_TAGS:
            self._early.popitem(last=False)
        if len(waiting) > MAX_EARLY_PACKETS:
            waiting.pop()
            return False
        return True
