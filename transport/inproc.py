"""The reference transport: both peers live in this process, and a write is a memmove at once. Also the test double.

Memory model: any memory will do; both sides' regions are addresses of this process. It is two-sided: the receiver's
landing decides which blocks may be written, counts them and keeps their digest.
Threading: no thread of its own; the receiver's inbox lock is held while bytes are copied, so that closing a landing,
an endpoint or the receiving transport is a fence.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from core.errors import TransferError
from transport.base import Blocks, Memory, Region
from transport.copying import copy_pairs
from transport.landing import CountedLanding, Inbox
from transport.regions import check_pairing, check_region, check_words, resolve
from transport.transfer import SettledTransfer

_transports: dict[bytes, InprocTransport] = {}


def make(host: str) -> InprocTransport:
    """See transport/schemes.py; the host does not matter."""
    return InprocTransport()


def unavailable() -> str:
    """See transport/schemes.py."""
    return ""


def is_reachable(description: bytes) -> bool:
    """Whether a description names an open transport of this process."""
    return description in _transports


class InprocTransport:
    """See transport/base.py."""

    def __init__(self) -> None:
        self.scheme = "inproc"
        self.regions: dict[int, Region] = {}
        self.inbox = Inbox()
        self._name = f"inproc-{secrets.token_hex(16)}".encode()
        _transports[self._name] = self

    def allocate(self, num_bytes: int) -> Memory | None:
        return None

    def register(self, region: Region) -> None:
        check_region(region, self.regions)
        self.regions[region.id] = region

    def describe(self) -> bytes:
        return self._name

    def connect(self, description: bytes) -> InprocEndpoint:
        peer = _transports.get(description)
        if peer is None:
            raise TransferError("the description names no transport of this process")
        return InprocEndpoint(self, peer)

    def expect(self, tag: str, blocks: Sequence[Blocks]) -> CountedLanding:
        check_words(tag, None)
        return self.inbox.open(tag, blocks, self.regions)

    def close(self) -> None:
        with self.inbox.lock:
            _transports.pop(self._name, None)

    def is_open(self) -> bool:
        """Whether peers can still write."""
        return self._name in _transports


class InprocEndpoint:
    """One connected peer of this process."""

    def __init__(self, own: InprocTransport, peer: InprocTransport) -> None:
        self._own = own
        self._peer = peer
        self._closed = False

    def write(self, tag: str, local: Blocks, remote: Blocks, notice: bytes | None = None) -> SettledTransfer:
        check_words(tag, notice)
        source = resolve(self._own.regions, local, "local")
        target = resolve(self._peer.regions, remote, "remote")
        check_pairing(local, source, remote, target)
        with self._peer.inbox.lock:
            why = self.failure()
            landing = self._peer.inbox.find(tag)
            if not why:
                why = f"nothing is expected under tag {tag!r}" if landing is None else ""
            if landing is None or why:
                return SettledTransfer(why)
            why = landing.refusal(remote.region, remote.ids, target) if remote.ids else ""
            if why:
                return SettledTransfer(why)
            copy_pairs(source, local.ids, target, remote.ids)
            landing.record(target, remote.ids)
            if notice is not None and not landing.notify(notice):
                return SettledTransfer("too many notices wait")
        return SettledTransfer()

    def read(self, remote: Blocks, local: Blocks) -> SettledTransfer:
        source = resolve(self._peer.regions, remote, "remote")
        target = resolve(self._own.regions, local, "local")
        check_pairing(local, target, remote, source)
        with self._peer.inbox.lock:
            why = self.failure()
            if not why:
                copy_pairs(source, remote.ids, target, local.ids)
        return SettledTransfer(why)

    def failure(self) -> str:
        if self._closed:
            return "the endpoint is closed"
        return "" if self._peer.is_open() and self._own.is_open() else "the peer's transport is closed"

    def close(self) -> None:
        with self._peer.inbox.lock:
            self._closed = True
