"""Where blocks of other hosts arrive: places in memory of the peers' tier, written into by holders over transport/.

    place 0 ┃ place 1 ┃ ... ┃ place 7       one block in each at most, from its place's beginning

A place is lent to one fetch at a time, and its landing is closed before the place is lent again: a holder that is late
writes nowhere. Nobody but the arena's server copies into the arena.

Memory model: PLACES * PLACE_BYTES of address space; only what blocks have touched takes memory.
Threading: any thread. The transport has a thread of its own, which copies what arrives.
"""

from __future__ import annotations

import ctypes
import mmap
import queue
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from core.clock import Clock
from core.errors import TransferError
from transport.base import Blocks, Region
from transport.landing import CountedLanding
from transport.zmq_tcp import ZmqTransport

PLACES = 8
PLACE_BYTES = 64 << 20
"""A larger block is not fetched from peers: 64 MiB are 16 tokens of 500 layers with 8 KV heads of 512 bytes."""

_REGION = 0


class Place:
    """One place while it is lent: `index` in the region, `tag` under which may be written."""

    def __init__(self, index: int, tag: str, address: int, landing: CountedLanding) -> None:
        self.index = index
        self.tag = tag
        self.address = address
        self._landing = landing

    def notice(self) -> bytes | None:
        """What came behind the data; None before."""
        notices = self._landing.poll()
        return notices[0] if notices else None


class LandingPlaces:
    """The places that peers reach at `host`, an address of this machine. Raises ConfigError if it is none."""

    def __init__(self, host: str, clock: Clock) -> None:
        self._transport = ZmqTransport(host, clock)
        self._memory = mmap.mmap(-1, PLACES * PLACE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._anchor = ctypes.c_char.from_buffer(self._memory)
        self._address = ctypes.addressof(self._anchor)
        self._transport.register(Region(_REGION, self._address, PLACE_BYTES, PLACE_BYTES, PLACES))
        self.description = self._transport.describe()
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(PLACES):
            self._free.put(index)

    @contextmanager
    def lend(self, timeout_s: float, on_notice: Callable[[], None]) -> Iterator[Place]:
        """A place until the block's end; after it nothing can be written there. Raises TransferError if all are lent
        for so long."""
        try:
            index = self._free.get(timeout=timeout_s)
        except queue.Empty:
            raise TransferError("every place for blocks of peers is taken") from None
        try:
            tag = secrets.token_hex(16)
            landing = self._transport.expect(tag, [Blocks(_REGION, (index,))])
            landing.on_notice = on_notice
            try:
                yield Place(index, tag, self._address + index * PLACE_BYTES, landing)
            finally:
                landing.close()
        finally:
            self._free.put(index)

    def close(self) -> None:
        """Ends the transport: nothing is written any more."""
        self._transport.close()


class Landings:
    """Places by this machine's address: usually one, under which all peers reach it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._places: dict[str, LandingPlaces] = {}
        self._is_closed = False

    def towards(self, host: str) -> LandingPlaces:
        """Those that a peer on this host reaches. Waits for the resolver. Raises TransferError or ConfigError."""
        own = _own_address(host)
        with self._lock:
            if self._is_closed:
                raise TransferError("the tier is closed")
            if own not in self._places:
                self._places[own] = LandingPlaces(own, self._clock)
            return self._places[own]

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            for places in self._places.values():
                places.close()


def _own_address(host: str) -> str:
    """This machine's address on the way to another. Nothing is sent. Raises TransferError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except (OSError, UnicodeError) as error:
        raise TransferError(f"no way to {host!r}: {error}") from error
