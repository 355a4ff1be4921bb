"""The digest that a device adds up: the same on a device made of host memory and by the kernel that a GPU gets."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from core.errors import TransferError
from tests.fakes.software_gpu import SoftwareGpu, software_library
from tests.poll import until
from transport.base import Memory, Region
from transport.cuda_kernels import MAX_SUMMED, NUM_TILES
from transport.device import Device
from transport.device_digest import DeviceDigests, words_sum
from transport.digest import BlockSum
from transport.host_device import HostDevice

BLOCK_BYTES = 4096
NUM_BLOCKS = NUM_TILES + 3
Stand = tuple[Device, Memory]


def _host() -> Device:
    return HostDevice()


def _software() -> Device:
    library = software_library() or pytest.skip("no g++ here, with which the software driver is compiled")
    return SoftwareGpu(library)


@pytest.fixture(name="stand", params=[_host, _software])
def _stand(request: pytest.FixtureRequest) -> Iterator[Stand]:
    device = request.param()
    memory = device.allocate(BLOCK_BYTES * NUM_BLOCKS)
    device.check(memory.address, memory.num_bytes)
    ctypes.memmove(memory.address, random.Random(1).randbytes(memory.num_bytes), memory.num_bytes)
    yield device, memory
    device.close()


def _region(memory: Memory, layer: int = 3) -> Region:
    return Region(layer, memory.address, BLOCK_BYTES, BLOCK_BYTES, NUM_BLOCKS)


def _value(total: BlockSum) -> int:
    until(lambda: total.value() is not None, what="the device to add up")
    return total.value() or 0


def _digest(stand: Stand, ids: list[int], first: int = 0, layer: int = 3) -> int:
    digests = DeviceDigests(stand[0])
    total = digests.begin()
    total.add(_region(stand[1], layer), ids, first, full=False)
    value = _value(total)
    total.release()
    digests.close()
    return value


def test_it_is_the_formula(stand: Stand) -> None:
    _, memory = stand
    ids = random.Random(2).sample(range(NUM_BLOCKS), NUM_BLOCKS)
    blocks = [ctypes.string_at(memory.address + block_id * BLOCK_BYTES, BLOCK_BYTES) for block_id in ids]
    expected = sum(words_sum(block, (3 << 32) + 7 + position) for position, block in enumerate(blocks)) % (1 << 64)
    assert _digest(stand, ids, 7) == expected


def test_every_bit_and_every_place_counts(stand: Stand) -> None:
    memory = stand[1]
    before = _digest(stand, [0, 1, 2])
    assert _digest(stand, [1, 0, 2]) != before
    assert _digest(stand, [0, 1, 2], first=1) != before
    assert _digest(stand, [0, 1, 2], layer=4) != before
    choose = random.Random(3)
    for _ in range(20):
        at, bit = memory.address + choose.randrange(3 * BLOCK_BYTES), 1 << choose.randrange(8)
        byte = ctypes.c_ubyte.from_address(at)
        byte.value ^= bit
        assert _digest(stand, [0, 1, 2]) != before
        byte.value ^= bit
    first, second = (ctypes.c_uint64.from_address(memory.address + at) for at in (64, 128))
    first.value, second.value = second.value, first.value
    assert _digest(stand, [0, 1, 2]) != before


def test_what_is_added_piece_by_piece_is_the_whole(stand: Stand) -> None:
    device, memory = stand
    digests = DeviceDigests(device)
    whole, pieces = digests.begin(), digests.begin()
    for layer in (0, 1):
        whole.add(_region(memory, layer), range(NUM_BLOCKS), 0, full=True)
    for first in (40, 0, 20):
        ids = range(first, NUM_BLOCKS if first == 40 else first + 20)
        for layer in (1, 0):
            pieces.add(_region(memory, layer), ids, first, full=True)
    assert _value(whole) == _value(pieces)
    whole.release()
    again = digests.begin()
    assert _value(again) == 0  # a sum that somebody else had begins at nothing
    digests.close()


def test_more_blocks_than_a_launch_takes(stand: Stand) -> None:
    ids = [number % NUM_BLOCKS for number in range(2 * MAX_SUMMED + 5)]
    parts = [_digest(stand, ids[first : first + 500], first) for first in range(0, len(ids), 500)]
    assert _digest(stand, ids) == sum(parts) % (1 << 64)


class _Held(NamedTuple):
    """A device, and its computation: it stands still while held."""

    device: Device
    hold: Callable[[bool], None]
    end: Callable[[], None]


def _held_host() -> _Held:
    device = HostDevice()
    return _Held(device, lambda is_held: device.hold() if is_held else device.let_go(), lambda: None)


def _held_software() -> _Held:
    library = ctypes.CDLL(software_library() or pytest.skip("no g++ here, with which the software driver is compiled"))
    device = SoftwareGpu(library._name, lambda: stream)
    stream = device.library.software_compute_stream()
    hold, end = device.library.software_hold, device.library.software_end
    return _Held(device, lambda is_held: hold(stream, int(is_held)), lambda: end(stream))


@pytest.mark.parametrize("make", [_held_host, _held_software])
def test_it_is_of_what_the_computation_leaves(make: Callable[[], _Held]) -> None:
    device, hold, end = make()
    memory = device.allocate(BLOCK_BYTES * NUM_BLOCKS)
    assert memory is not None
    device.check(memory.address, memory.num_bytes)
    digests = DeviceDigests(device)
    hold(True)
    total = digests.begin()
    total.add(_region(memory), [1], 0, full=True)
    assert total.value() is None
    content = random.Random(4).randbytes(BLOCK_BYTES)
    ctypes.memmove(memory.address + BLOCK_BYTES, content, BLOCK_BYTES)  # what is still computed when it was asked for
    hold(False)
    assert _value(total) == words_sum(content, 3 << 32)
    digests.close()
    device.close()
    end()


def test_blocks_that_are_no_words_are_refused() -> None:
    library = software_library() or pytest.skip("no g++ here, with which the software driver is compiled")
    device = SoftwareGpu(library)
    memory = device.allocate(4096)
    device.check(memory.address, memory.num_bytes)
    digests = DeviceDigests(device)
    with pytest.raises(TransferError, match="words of 8 bytes"):
        digests.begin().add(Region(0, memory.address, 1001, 1001, 4), [0], 0, full=True)
    digests.close()
    device.close()
