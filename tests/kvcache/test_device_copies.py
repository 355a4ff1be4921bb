"""Blocks in a device's memory, to the arena and back: behind what computes them, whole, and never after their step.

On a device made of host memory, and by the CUDA calls that a GPU would get, made to a driver in software.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator

import pytest

from core.clock import ManualClock, SystemClock
from core.errors import TransferError
from kvcache import device_copies
from kvcache.arena import Arena, block_digest
from kvcache.copiers import Copiers
from kvcache.device_copies import DeviceReads, DeviceWrites
from kvcache.loader import Loader
from kvcache.orders import CacheResults, Load, Loaded, Piece, Store, Stored
from kvcache.storer import Storer
from tests.fakes.software_gpu import SoftwareGpu, software_library
from tests.kvcache.places import BLOCK_BYTES, LAYER_BYTES, LAYERS, key
from tests.poll import until
from transport.base import Region
from transport.device import Device
from transport.faultpoint import FaultPoint
from transport.host_device import HostDevice
from transport.mapping import Mapping, make_memfd

NUM_BLOCKS = 8
ARENA_BYTES = NUM_BLOCKS * BLOCK_BYTES


class Computation:
    """What a device computes: it stands still while held, until it has failed, as long as it has."""

    def __init__(self, device: Device, hold: Callable[[bool], object], fail: Callable[[bool], object]) -> None:
        self.device = device
        self.hold = hold
        self.fail = fail


def on_host() -> Iterator[Computation]:
    device = HostDevice()
    yield Computation(
        device,
        lambda held: device.hold() if held else device.let_go(),
        lambda failed: device.fail("the device is gone" if failed else ""),
    )
    device.close()


def on_driver() -> Iterator[Computation]:
    library = software_library() or pytest.skip("no g++ here, with which the software driver is compiled")
    gpu = SoftwareGpu(library, lambda: stream)
    stream = gpu.library.software_compute_stream()
    yield Computation(
        gpu,
        lambda held: gpu.library.software_hold(stream, int(held)),
        lambda failed: gpu.library.software_fail(700 if failed else 0),
    )
    gpu.close()
    gpu.library.software_end(stream)
    taken = ("streams", "events", "retained", "pinned", "memories")
    until(lambda: all(gpu.count(what) == 0 for what in taken), what="everything taken from the GPU is given back")


class Stand:
    """An engine's blocks in a device's memory, all different, and an arena that it has pinned."""

    def __init__(self, computation: Computation) -> None:
        self.computation = computation
        device = self.device = computation.device
        self.memory = device.allocate(NUM_BLOCKS * BLOCK_BYTES)
        assert self.memory is not None
        device.check(self.memory.address, self.memory.num_bytes)
        size = NUM_BLOCKS * LAYER_BYTES
        self.regions = [
            Region(layer, self.memory.address + layer * size, LAYER_BYTES, LAYER_BYTES, NUM_BLOCKS)
            for layer in range(LAYERS)
        ]
        self.fd = make_memfd(ARENA_BYTES)
        self.kept = Mapping(self.fd, ARENA_BYTES)
        self.arena = Arena(self.regions, lambda: (os.dup(self.fd), ARENA_BYTES, "arena"), device=device)
        self.arena.map()
        self.copiers = Copiers(2)
        self.reads = DeviceReads(device, self.regions, self.copiers, FaultPoint())
        self.loader = Loader(self.arena, self.reads, SystemClock())
        self.clock = ManualClock()
        self.storer = Storer(self.arena, LAYERS, self.clock, FaultPoint(), DeviceWrites(device, self.regions))
        for block_id in range(NUM_BLOCKS):
            self.compute(block_id, block_id)

    def compute(self, block_id: int, number: int, layers: range = range(LAYERS)) -> None:
        """Puts bytes of this number into a block."""
        for layer in layers:
            text = f"{number}/{layer};".encode() * LAYER_BYTES
            ctypes.memmove(self.regions[layer].address + block_id * LAYER_BYTES, text, LAYER_BYTES)

    def block(self, block_id: int) -> bytes:
        return b"".join(
            ctypes.string_at(region.address + block_id * LAYER_BYTES, LAYER_BYTES) for region in self.regions
        )

    def slot(self, number: int) -> bytes:
        return self.kept._mmap[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]

    def begin(self, *block_ids: int, slot_bytes: int = BLOCK_BYTES) -> None:
        """A step that stores blocks in the slots of their numbers; its layers are given to the device."""
        pieces = [Piece(block_id, block_id * slot_bytes, key(block_id)) for block_id in block_ids]
        self.storer.begin_step([Store("r", "arena", 1, self.clock.monotonic_s() + 100.0, pieces)])
        for layer in range(LAYERS - 1):
            self.storer.save_layer(layer)  # the last layer's hook is never called: the step's end must find it

    def end(self) -> Stored:
        results = CacheResults()
        self.storer.end_step(results)
        (stored,) = results.stored
        return stored

    def load(self, stored: Stored, first_block: int) -> None:
        pieces = [
            Piece(first_block + index, block.offset, block.key, block.digest, "host", 16)
            for index, block in enumerate(stored.blocks)
        ]
        self.loader.start(Load("r", "arena", pieces))

    def loaded(self) -> Loaded:
        (loaded,) = until(self.loader.ended, what="the load's end")
        return loaded

    def close(self) -> None:
        self.loader.close()
        self.reads.close()
        self.storer.close()
        self.copiers.close()
        self.arena.close()
        self.kept.close()
        os.close(self.fd)


@pytest.fixture(params=[on_host, on_driver])
def stand(request: pytest.FixtureRequest) -> Iterator[Stand]:
    computations = request.param()
    stand = Stand(next(computations))
    yield stand
    stand.close()
    next(computations, None)


def test_what_is_stored_is_what_the_step_computes_and_comes_back_whole(stand: Stand) -> None:
    stand.computation.hold(True)
    stand.begin(2, 0)
    for block_id in (0, 2):
        stand.compute(block_id, 40 + block_id)  # after the hooks: a GPU is behind them
    stand.computation.hold(False)
    stored = stand.end()
    assert [stand.slot(number) for number in (0, 2)] == [stand.block(0), stand.block(2)]
    assert [(block.key, block.digest) for block in stored.blocks] == [
        (key(number), block_digest(key(number), memoryview(stand.slot(number)), LAYERS)) for number in (2, 0)
    ]
    stand.load(stored, 5)
    loaded = stand.loaded()
    assert (loaded.why, loaded.num_bytes) == ("", 2 * BLOCK_BYTES)
    assert (stand.block(5), stand.block(6)) == (stand.block(2), stand.block(0))


def ends_when_let_go(stand: Stand) -> list[Stored]:
    """The step's answers, of which there is none while the computation stands still."""
    answers: list[Stored] = []
    step = threading.Thread(target=lambda: answers.append(stand.end()))
    step.start()
    step.join(0.2)
    assert step.is_alive()
    stand.computation.hold(False)
    step.join(10.0)
    return answers


def test_a_step_ends_when_its_blocks_have_been_copied(stand: Stand) -> None:
    """They may be anybody's then: another request's, or a peer's, which writes when it likes."""
    stand.computation.hold(True)
    stand.begin(1)
    (stored,) = ends_when_let_go(stand)
    assert [block.key for block in stored.blocks] == [key(1)]
    assert stand.slot(1) == stand.block(1)


def test_a_store_that_is_given_up_has_ended_too(stand: Stand) -> None:
    """Its slot will be another's."""
    stand.computation.hold(True)
    stand.begin(1)
    stand.storer.spoil()
    (stored,) = ends_when_let_go(stand)
    assert (stored.blocks, stored.given_up) == ([], [key(1)])


def test_a_load_comes_behind_what_was_computed_before_it(stand: Stand) -> None:
    """The blocks were somebody else's until now, who may still write them."""
    stand.begin(3)
    stored = stand.end()
    stand.computation.hold(True)
    stand.load(stored, 6)
    threading.Event().wait(0.1)
    assert stand.loader.ended() == []
    stand.compute(6, 99)
    stand.computation.hold(False)
    assert stand.loaded().why == ""
    assert stand.block(6) == stand.block(3)


@pytest.mark.parametrize("at", [0, BLOCK_BYTES // 2, BLOCK_BYTES - 1])
def test_a_byte_that_differs_is_found(stand: Stand, at: int) -> None:
    stand.begin(3, 4)
    stored = stand.end()
    stand.computation.hold(True)
    stand.load(stored, 6)
    stand.kept._mmap[4 * BLOCK_BYTES + at] ^= 1  # while it is on its way
    stand.computation.hold(False)
    loaded = stand.loaded()
    assert "differs" in loaded.why
    assert [bad.key for bad in loaded.bad] == [key(4)]


def test_a_slot_that_is_none_is_refused_before_anything_is_copied(stand: Stand) -> None:
    stand.begin(7, slot_bytes=2 * BLOCK_BYTES)
    assert stand.end().given_up == [key(7)]
    stand.begin(1, slot_bytes=100)
    assert stand.end().given_up == [key(1)]
    stand.loader.start(Load("r", "arena", [Piece(1, ARENA_BYTES, key(1))]))
    assert "outside the arena" in stand.loaded().why
    stand.loader.start(Load("r", "another arena", [Piece(1, 0, key(1))]))
    assert "another arena" in stand.loaded().why


def test_a_device_that_fails_gives_everything_up(stand: Stand) -> None:
    stand.begin(3)
    stored = stand.end()
    stand.computation.hold(True)
    stand.begin(4)
    stand.load(stored, 6)
    stand.computation.fail(True)
    assert stand.end().given_up == [key(4)]
    assert stand.loaded().why
    stand.computation.fail(False)
    stand.computation.hold(False)


def test_a_device_that_stands_still_holds_a_step_up_for_so_long(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_copies, "DEVICE_WAIT_S", 0.2)
    stand.computation.hold(True)
    stand.begin(4)
    assert stand.end().given_up == [key(4)]
    stand.computation.hold(False)


class Unpinnable(HostDevice):
    """It has no room for more."""

    def __init__(self) -> None:
        super().__init__()
        self.num_asked = 0

    def pin(self, address: int, num_bytes: int) -> int:
        self.num_asked += 1
        raise TransferError("the host's memory cannot be pinned")


def test_an_arena_that_cannot_be_pinned_is_not_used_and_asked_about_once(caplog: pytest.LogCaptureFixture) -> None:
    device = Unpinnable()
    fd = make_memfd(ARENA_BYTES)
    arena = Arena([], lambda: (os.dup(fd), ARENA_BYTES, "arena"), device=device)
    for _ in range(3):
        with pytest.raises(TransferError, match="cannot be pinned"):
            arena.map("arena")
    assert arena.get("arena") is None
    assert device.num_asked == 1
    assert caplog.text.count("cannot be used: the host's memory cannot be pinned") == 1
    os.close(fd)
    device.close()


class Counting(HostDevice):
    """Knows what it has pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: list[int] = []

    def pin(self, address: int, num_bytes: int) -> int:
        self.pinned.append(address)
        return address

    def unpin(self, address: int) -> None:
        self.pinned.remove(address)


def test_an_arena_that_another_has_replaced_is_let_go_of() -> None:
    device, names = Counting(), iter(["first", "second"])
    fd = make_memfd(ARENA_BYTES)
    arena = Arena([], lambda: (os.dup(fd), ARENA_BYTES, next(names)), device=device)
    arena.map("first")
    first = device.pinned.copy()
    arena.map("second")
    assert len(device.pinned) == 1
    assert device.pinned != first
    arena.close()
    assert device.pinned == []
    os.close(fd)
    device.close()
