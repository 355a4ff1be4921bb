"""Blocks by NIXL: RDMA, GPU memory, or on a plain host whatever UCX finds there; one-sided writes.

    engine's thread                         the transport's thread (nixl_thread.py)
    write ──▶ NixlEndpoint ── call ──▶ NixlLink ──▶ Lane per tag ──▶ NixlAgent ══▶ the owner's blocks
                                        │ TCP: may I, I am busy, I have stopped (nixl_wire.py)
                                        ▼
    expect ──▶ NixlLanding ◀────────── NixlListener ◀── notices (NIXL notifications)

The owner sees no bytes. It grants each tag before the first byte moves, so a landing nobody was let into is its own
fence; otherwise the fence is the writer's word (Stopped, soon after `Landing.close`) or the end of its connection.
Memory model: any memory will do, the host's or a GPU's (`Region.device`), as long as it stays mapped until `close`; it
is registered with NIXL from the first `describe` or `connect` on, and released in `close`.
Threading: one thread, and nothing here waits for a peer. NIXL's first agent of a process takes a second to load and
half a second to make, so it is made when it is first needed.
"""

from __future__ import annotations

import collections
import secrets
from collections.abc import Sequence
from typing import Any

from core.clock import Clock, SystemClock
from core.errors import ConfigError, TransferError
from transport.address import bind_address
from transport.base import Blocks, Memory, Region
from transport.landing import expected_positions
from transport.nixl_agent import NixlAgent, NixlOptions, library_version, why_missing
from transport.nixl_endpoint import NixlEndpoint
from transport.nixl_landing import NixlLanding
from transport.nixl_listener import NixlListener
from transport.nixl_thread import NixlThread
from transport.nixl_wire import (
    NixlDescription,
    RegionPlace,
    decode_description,
    encode_description,
    is_description,
    metadata_digest,
)
from transport.regions import check_region, check_words

MAX_METADATA_KEPT = 16

__all__ = ["NixlOptions", "NixlTransport", "is_reachable", "make", "make_with", "unavailable"]


def make(host: str) -> NixlTransport:
    """See transport/schemes.py. Raises ConfigError if the host is not ours."""
    return NixlTransport(host)


def make_with(host: str, options: dict[str, Any]) -> NixlTransport:
    """See transport/schemes.py. Raises ConfigError for an unknown option too."""
    return NixlTransport(host, NixlOptions.parse(options))


def unavailable() -> str:
    """See transport/schemes.py."""
    return why_missing()


def is_reachable(description: bytes) -> bool:
    """See transport/schemes.py: beyond the protocol's version, only a try will tell."""
    return is_description(description)


class NixlTransport:
    """See transport/base.py. `host`: an address of this machine that peers can reach."""

    def __init__(self, host: str, options: NixlOptions | None = None, clock: Clock | None = None) -> None:
        bind_address(host)
        self.scheme = "nixl"
        self._host = host
        self._options = options or NixlOptions()
        self._clock = clock or SystemClock()
        self._regions: dict[int, Region] = {}
        self._described = _Described()
        self._running: _Running | None = None
        self._is_closed = False

    @property
    def malformed(self) -> int:
        """Messages that were dropped because they do not parse, or name nothing that we know."""
        return 0 if self._running is None else self._running.listener.malformed

    def allocate(self, num_bytes: int) -> Memory | None:
        return None

    def register(self, region: Region) -> None:
        check_region(region, self._regions)
        if self._running is not None:
            self._running.agent.register(region)
        self._regions[region.id] = region

    def describe(self) -> bytes:
        running = self._run()
        digest = self._described.add(running.agent.metadata(), len(self._regions))
        places = [
            RegionPlace(each.id, each.address, each.block_bytes, each.stride, each.num_blocks, each.device)
            for each in self._regions.values()
        ]
        agent, backend = running.agent.name, self._options.backend
        listener = running.listener
        return encode_description(
            NixlDescription(listener.address, running.token, agent, library_version(), backend, digest, places),
            self._options.secret,
        )

    def connect(self, description: bytes) -> NixlEndpoint:
        if self._is_closed:
            raise TransferError("the transport is closed")
        parsed = decode_description(description, self._options.secret)
        theirs, ours = (parsed.library, parsed.backend), (library_version(), self._options.backend)
        if _release(theirs[0]) != _release(ours[0]) or theirs[1] != ours[1]:
            raise TransferError(
                f"the peer runs NIXL {theirs[0]} with back end {theirs[1]}, we run {ours[0]} with {ours[1]}: "
                "install the same on both sides"
            )
        return NixlEndpoint(self._regions, parsed, self._run().thread)

    def expect(self, tag: str, blocks: Sequence[Blocks]) -> NixlLanding:
        check_words(tag, None)
        expected_positions(blocks, self._regions)
        return self._run().listener.landings.open(tag)

    def close(self) -> None:
        """Winds up every endpoint (bounded by CLOSE_GRACE_S), hangs up, releases the registered memory."""
        self._is_closed = True
        if self._running is not None:
            self._running.close()
            self._running = None

    def _run(self) -> _Running:
        if self._is_closed:
            raise TransferError("the transport is closed")
        if self._running is None:
            self._running = _Running(self._host, self._options, self._clock, self._described)
            for region in self._regions.values():
                self._running.agent.register(region)
        return self._running


class _Described:
    """The agent's metadata by digest, for peers that come with a description; the newest few."""

    def __init__(self) -> None:
        self._by_digest: collections.OrderedDict[bytes, bytes] = collections.OrderedDict()
        self._latest = (-1, b"")

    def add(self, metadata: bytes, num_regions: int) -> bytes:
        """Its digest; one packing per set of regions is kept."""
        if self._latest[0] == num_regions:
            return self._latest[1]
        digest = metadata_digest(metadata)
        self._by_digest[digest] = metadata
        self._latest = (num_regions, digest)
        while len(self._by_digest) > MAX_METADATA_KEPT:
            self._by_digest.popitem(last=False)
        return digest

    def find(self, digest: bytes) -> bytes | None:
        return self._by_digest.get(digest)


class _Running:
    """What exists from the first use on: the agent, its thread, its listener."""

    def __init__(self, host: str, options: NixlOptions, clock: Clock, described: _Described) -> None:
        self.token = secrets.token_hex(16)
        self.agent = NixlAgent(options, host)
        self.thread = NixlThread(self.agent, clock)
        try:
            self.listener = NixlListener(host, self.token, self.thread, described.find)
        except ConfigError:
            self.thread.discard()
            self.agent.close()
            raise
        self.listener.start()
        self.thread.start()

    def close(self) -> None:
        if self.thread.close():
            self.agent.close()


def _release(version: str) -> list[str]:
    """Its first two numbers: what NIXL packs differs between releases."""
    return version.split(".")[:2]
