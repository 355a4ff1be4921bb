"""Memory that may be written at any time by anyone who is connected: where paths are measured, never in KV blocks.

    prober's scratch: blocks 0..31 ── write ──▶ owner's scratch: blocks 32..63      landing "probe:<prober's boot id>"
                      blocks 32..63 ◀── read ── owner's scratch: blocks 0..31

Memory model: 2 MiB, one region of 64 blocks under the id SCRATCH_REGION in every transport of a process; one that must
own its memory has 2 MiB for itself. What lies in it means nothing, so any number of probers may write it at once.
Threading: `Scratch` is made before the transports are described; `ScratchLandings` has a lock of its own.
"""

from __future__ import annotations

import collections
import ctypes
import threading
from collections.abc import Mapping

from transport.base import Blocks, Landing, Memory, Region, Transport

SCRATCH_REGION = (1 << 30) - 1
SCRATCH_BLOCK_BYTES = 32 << 10
NUM_SCRATCH_BLOCKS = 64
ROUND_BLOCKS = NUM_SCRATCH_BLOCKS // 2
MAX_PROBERS = 256


class OwnMemory:
    """Zeroed memory of this process; satisfies `transport.base.Memory`."""

    def __init__(self, num_bytes: int) -> None:
        self._buffer = ctypes.create_string_buffer(num_bytes)
        self.address = ctypes.addressof(self._buffer)
        self.num_bytes = num_bytes


class Scratch:
    """Allocates and registers the memory, before `describe`; keep it as long as the transports. device: the GPU whose
    memory the transports allocate."""

    def __init__(self, transports: Mapping[str, Transport], device: int | None = None) -> None:
        num_bytes = SCRATCH_BLOCK_BYTES * NUM_SCRATCH_BLOCKS
        shape = (SCRATCH_BLOCK_BYTES, SCRATCH_BLOCK_BYTES, NUM_SCRATCH_BLOCKS)
        shared: Memory = OwnMemory(num_bytes)
        self._memories = [shared]
        for transport in transports.values():
            owned = transport.allocate(num_bytes)
            self._memories += [owned] if owned is not None else []
            transport.register(Region(SCRATCH_REGION, (owned or shared).address, *shape, device))


class ScratchLandings:
    """The landings under which probers may write, one per prober and transport; the oldest go beyond MAX_PROBERS."""

    def __init__(self, transports: Mapping[str, Transport]) -> None:
        self._transports = transports
        self._lock = threading.Lock()
        self._open: collections.OrderedDict[str, list[Landing]] = collections.OrderedDict()

    def expect(self, boot_id: str) -> None:
        """The instance of this boot id may probe us from now on. May be called again."""
        with self._lock:
            if boot_id in self._open:
                return
            tag, blocks = probe_tag(boot_id), [Blocks(SCRATCH_REGION, tuple(range(NUM_SCRATCH_BLOCKS)))]
            self._open[boot_id] = [transport.expect(tag, blocks) for transport in self._transports.values()]
            while len(self._open) > MAX_PROBERS:
                for landing in self._open.popitem(last=False)[1]:
                    landing.close()

    def close(self) -> None:
        """No prober may write any more."""
        with self._lock:
            for landings in self._open.values():
                for landing in landings:
                    landing.close()
            self._open.clear()


def probe_tag(boot_id: str) -> str:
    """The tag under which the instance of this boot id probes others."""
    return f"probe:{boot_id}"
