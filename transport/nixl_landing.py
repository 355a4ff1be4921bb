"""The receiving end of the NIXL transport: who may write under which tag, and how that ends.

    Opening ──▶ granted: the writer belongs to the landing until it has stopped or is gone
            ──▶ parked until `expect`, two seconds at most      ──▶ refused: the landing was closed

Memory model: NIXL writes by itself, so a landing sees notices and not bytes. What makes up for it is that nobody writes
before this side has granted it: a landing that nobody was let into is its own fence.
Threading: `Landings.lock` guards everything here between the engine's thread and the transport's.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable

from core.errors import TransferError
from transport.landing import MAX_CLOSED_TAGS, MAX_NOTICES


class Writer:
    """One connected peer, as landings see it. `has_ended`: nothing that it sent can arrive any more."""

    def __init__(self) -> None:
        self.has_ended = False
        self.granted: dict[str, NixlLanding] = {}


class NixlLanding:
    """A `transport.base.Landing` that sees notices but not bytes."""

    def __init__(self, landings: Landings, tag: str) -> None:
        self._landings = landings
        self._notices: collections.deque[bytes] = collections.deque()
        self._has_stopped: dict[Writer, bool] = {}
        self._is_fence: bool | None = None
        self.tag = tag

    def poll(self) -> list[bytes]:
        with self._landings.lock:
            notices = list(self._notices)
            self._notices.clear()
        return notices

    def num_written(self) -> int | None:
        return None

    def digest(self) -> int | None:
        return None

    def peer_gone(self) -> bool:
        """Also once every writer has said that it stopped, which it does soon after `close`."""
        with self._landings.lock:
            writers = self._has_stopped.items()
            return bool(writers) and all(stopped or writer.has_ended for writer, stopped in writers)

    def has_writer(self) -> bool:
        with self._landings.lock:
            return bool(self._has_stopped)

    def close(self) -> bool:
        """True if nobody was ever let in: from now on nobody will be."""
        with self._landings.lock:
            if self._is_fence is None:
                self._is_fence = not self._has_stopped
                self._landings.shut(self)
            return self._is_fence

    def is_open(self) -> bool:
        """Under the lock."""
        return self._is_fence is None

    def let_in(self, writer: Writer) -> None:
        """Under the lock."""
        self._has_stopped[writer] = False
        writer.granted[self.tag] = self

    def has_stopped(self, writer: Writer) -> None:
        """Under the lock."""
        if writer in self._has_stopped:
            self._has_stopped[writer] = True

    def take(self, notice: bytes) -> bool:
        """False if too many wait. Under the lock."""
        if not self.is_open():
            return True
        if len(self._notices) >= MAX_NOTICES:
            return False
        self._notices.append(notice)
        return True


class Landings:
    """Every landing of one transport, by tag. `on_open`, `on_shut`: called with the tag, under the lock."""

    def __init__(self, on_open: Callable[[str], None], on_shut: Callable[[str], None]) -> None:
        self.lock = threading.RLock()
        self._on_open = on_open
        self._on_shut = on_shut
        self._open: dict[str, NixlLanding] = {}
        self._closed: collections.OrderedDict[str, None] = collections.OrderedDict()

    def open(self, tag: str) -> NixlLanding:
        """Raises TransferError if the tag is open already."""
        with self.lock:
            if tag in self._open:
                raise TransferError(f"a landing is open already under tag {tag!r}")
            self._closed.pop(tag, None)
            landing = self._open[tag] = NixlLanding(self, tag)
            self._on_open(tag)
        return landing

    def find(self, tag: str) -> NixlLanding | None:
        """The open landing. Under the lock."""
        return self._open.get(tag)

    def was_closed(self, tag: str) -> bool:
        """Under the lock."""
        return tag in self._closed

    def shut(self, landing: NixlLanding) -> None:
        """Under the lock."""
        if self._open.get(landing.tag) is landing:
            del self._open[landing.tag]
        self._closed[landing.tag] = None
        while len(self._closed) > MAX_CLOSED_TAGS:
            self._closed.popitem(last=False)
        self._on_shut(landing.tag)
