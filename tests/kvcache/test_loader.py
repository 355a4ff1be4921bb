"""A load's blocks are shared out among threads: all of them right, none after the load has ended."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from core.clock import SystemClock
from core.errors import TransferError
from kvcache import host_copies
from kvcache.arena import Arena, MappedArena
from kvcache.copiers import Copiers
from kvcache.copies import Reads
from kvcache.device_copies import DeviceReads
from kvcache.host_copies import HostReads
from kvcache.loader import Loader
from kvcache.orders import Load, Loaded, Piece
from tests.kvcache.places import BLOCK_BYTES, Engine, key, stored
from tests.poll import until
from transport.affinity import num_copying_threads
from transport.faultpoint import FaultPoint
from transport.host_device import HostDevice
from transport.mapping import Mapping, make_memfd

NUM_BLOCKS = 16
COUNT = 7


class Kept:
    """An engine whose blocks 0 to 6 lie in an arena too, and a loader that reads them into blocks 8 to 14. device: in
    whose memory the engine's blocks lie."""

    def __init__(self, device: HostDevice | None = None) -> None:
        self.engine = Engine(NUM_BLOCKS)
        self.listens = False
        num_bytes = NUM_BLOCKS * BLOCK_BYTES
        fd = make_memfd(num_bytes)
        self.memory = Mapping(fd, num_bytes)
        self.arena = arena = Arena(self.engine.regions, lambda: (os.dup(fd), num_bytes, "arena"), device=device)
        mapped = arena.map()
        os.close(fd)
        self.pieces = stored(self.engine, mapped, COUNT)
        self.heard: list[list[Loaded]] = []
        self.copiers = Copiers(3)
        self.reads: Reads = HostReads(self.copiers, FaultPoint())
        if device is not None:
            self.reads = DeviceReads(device, self.engine.regions, self.copiers, FaultPoint())
        self.loader = Loader(arena, self.reads, SystemClock(), self._hear)

    def load(self, pieces: list[Piece] | None = None) -> Loaded:
        self.loader.start(Load("r", "arena", pieces or self.pieces))
        (loaded,) = until(self.loader.ended, what="the load's end")
        return loaded

    def _hear(self) -> None:
        if self.listens:
            self.heard.append(self.loader.ended())

    def close(self) -> None:
        self.loader.close()
        self.reads.close()
        self.copiers.close()
        self.arena.close()
        self.memory.close()


@pytest.fixture(params=[None, HostDevice], ids=["processor", "device"])
def anywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kept]:
    """Whoever copies. Also small loads are shared, among three threads."""
    monkeypatch.setattr(host_copies, "MIN_SHARED_BYTES", 1)
    kept = Kept(request.param() if request.param else None)
    yield kept
    kept.close()


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kept]:
    """Also small loads are shared, among three threads."""
    monkeypatch.setattr(host_copies, "MIN_SHARED_BYTES", 1)
    kept = Kept()
    yield kept
    kept.close()


def test_every_block_comes_whole_whoever_reads_it(anywhere: Kept) -> None:
    kept = anywhere
    loaded = kept.load()
    assert (loaded.why, loaded.num_blocks, loaded.num_bytes) == ("", COUNT, COUNT * BLOCK_BYTES)
    assert loaded.tokens == {"host": COUNT * 128}
    assert [kept.engine.block(8 + n) for n in range(COUNT)] == [kept.engine.block(n) for n in range(COUNT)]


@pytest.mark.parametrize("number", range(COUNT))
def test_a_block_that_differs_is_found_by_any_thread(anywhere: Kept, number: int) -> None:
    kept = anywhere
    kept.memory._mmap[number * BLOCK_BYTES + 5] ^= 1
    loaded = kept.load()
    assert "differs" in loaded.why
    assert [bad.key for bad in loaded.bad] == [key(number)]


@pytest.mark.parametrize("broken", range(3))
def test_a_load_has_ended_only_when_no_thread_writes_any_more(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    """Also where one of them has failed at once: the engine gives the blocks away when it hears of the end."""
    ended: list[int] = []
    read = MappedArena.read_block

    def slowly(self: MappedArena, block_id: int, offset: int, block_key: bytes, digest: int) -> bool:
        if block_id == 8 + broken:
            raise TransferError("lies outside the arena")
        time.sleep(0.05)
        ended.append(block_id)
        return read(self, block_id, offset, block_key, digest)

    monkeypatch.setattr(MappedArena, "read_block", slowly)
    loaded = kept.load()
    assert loaded.why == "lies outside the arena"
    num_ended = len(ended)
    time.sleep(0.2)
    assert len(ended) == num_ended
    assert num_ended == COUNT - len(range(broken, COUNT, 3)), "what the others had was read"
    monkeypatch.undo()
    assert kept.load().why == "", "the next load finds every thread free"


def test_who_sleeps_meanwhile_is_told_when_the_loads_end_can_be_had(anywhere: Kept) -> None:
    kept = anywhere
    kept.listens = True
    kept.loader.start(Load("sleeper", "arena", kept.pieces))
    ((loaded,),) = until(lambda: kept.heard, what="somebody says so")
    assert (loaded.request_id, loaded.why) == ("sleeper", "")
    kept.loader.start(Load("lost", "another arena", kept.pieces))
    assert until(lambda: kept.heard[1:], what="also of a load that failed")[0][0].why


def test_a_load_of_a_few_blocks_needs_no_other_thread(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_copies, "MIN_SHARED_BYTES", COUNT * BLOCK_BYTES)
    monkeypatch.setattr(kept.copiers, "submit", lambda *_: pytest.fail("another thread was woken"))
    assert kept.load(kept.pieces[:-1]).why == ""


@pytest.mark.parametrize(("num_cores", "expected"), [(1, 1), (2, 2), (8, 2), (16, 2), (24, 3), (32, 4), (256, 4)])
def test_most_cores_are_left_to_those_who_compute(num_cores: int, expected: int) -> None:
    assert num_copying_threads(num_cores) == expected
