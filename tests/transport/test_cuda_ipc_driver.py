"""The CUDA calls of cuda_ipc, made to a driver in software that is as strict as the documentation.

The device code and the kernel are those that a GPU gets; what the driver does with them is host memory and threads. It
proves order, arguments, contexts and clean-up, and nothing about speed or hardware.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import msgspec
import pytest

from core.errors import ConfigError, TransferError
from tests.fakes.software_gpu import SoftwareGpu, software_library
from tests.poll import until
from tests.transport.memory import Owned
from tests.transport.peer_process import NUM_BLOCKS, ROOT, PeerProcess
from transport import cuda_pinned
from transport.base import Blocks, Region, TransferState
from transport.conformance import check_transport
from transport.conformance_pair import finish, wait_for
from transport.cuda_driver import CudaDriver
from transport.cuda_ipc import CudaIpcTransport
from transport.cuda_kernels import MAX_BLOCKS, PTX, Batch, compile_ptx, fill, unit_of
from transport.faulty import Faults, FaultyTransport
from transport.regions import Span

BLOCK_BYTES = 1 << 19
LEFTOVERS = ("streams", "events", "opened", "retained", "contexts", "pinned", "memories")


@pytest.fixture(name="library", scope="module")
def _library() -> str:
    return software_library() or pytest.skip("no g++ here, with which the software driver is compiled")


@pytest.fixture(name="gpu")
def _gpu(library: str) -> Iterator[SoftwareGpu]:
    gpu = SoftwareGpu(library)
    yield gpu
    gpu.library.software_fail(0)
    gpu.close()
    until(lambda: all(gpu.count(what) == 0 for what in LEFTOVERS), what="everything taken from the GPU is given back")


def test_it_does_what_every_transport_must(library: str, gpu: SoftwareGpu) -> None:
    check_transport(lambda: CudaIpcTransport(SoftwareGpu(library)))
    check_transport(lambda: FaultyTransport(CudaIpcTransport(SoftwareGpu(library)), Faults(delay_polls=2)))


def test_the_copy_waits_for_the_stream_that_computes(library: str, gpu: SoftwareGpu) -> None:
    for follows_one_stream in (True, False):
        stream = gpu.library.software_compute_stream()
        other = gpu.library.software_compute_stream()
        followed = functools.partial(int, stream) if follows_one_stream else None
        sender = Owned(CudaIpcTransport(SoftwareGpu(library, followed)), fill=1)
        receiver = Owned(CudaIpcTransport(SoftwareGpu(library)))
        landing = receiver.expect("t", range(8))
        endpoint = sender.transport.connect(receiver.transport.describe())
        finish(endpoint.write("t", sender.blocks([7]), receiver.blocks([7])))
        gpu.library.software_hold(stream, 1)
        gpu.library.software_hold(other, 1 if follows_one_stream else 0)
        # What a stream still computes is a mark that no copy passes; the other stream's work is nobody's business.
        transfer = endpoint.write("t", sender.blocks([0]), receiver.blocks([0]), b"done")
        threading.Event().wait(0.05)
        assert transfer.poll() is TransferState.RUNNING
        assert receiver.block(0)[0] == 0
        ctypes.memset(sender.region.address, 42, 4096)
        gpu.library.software_hold(stream, 0)
        finish(transfer)
        assert until(landing.poll, what="the notice") == [b"done"]
        assert receiver.block(0) == bytes([42]) * 4096
        gpu.library.software_hold(other, 0)
        endpoint.close()
        for owned in (sender, receiver):
            owned.transport.close()
        _destroy(gpu, stream, other)


def test_thousands_of_small_blocks_are_a_few_launches(library: str, gpu: SoftwareGpu) -> None:
    sender = Owned(CudaIpcTransport(SoftwareGpu(library)), 1024, 4096, fill=1)
    receiver = Owned(CudaIpcTransport(SoftwareGpu(library)), 1024, 4096)
    ctypes.memmove(sender.region.address, random.Random(1).randbytes(4 << 20), 4 << 20)
    local, remote = random.Random(2).sample(range(4096), 4096), random.Random(3).sample(range(4096), 4096)
    endpoint = sender.transport.connect(receiver.transport.describe())
    finish(endpoint.write("t", sender.blocks([]), receiver.blocks([])))
    before = gpu.count("launches")
    finish(endpoint.write("t", sender.blocks(local), receiver.blocks(remote)))
    assert gpu.count("launches") - before == -(-4096 // MAX_BLOCKS) == 9
    assert all(sender.block(i) == receiver.block(j) for i, j in zip(local, remote, strict=True))
    endpoint.close()
    for owned in (sender, receiver):
        owned.transport.close()


def test_another_process_maps_writes_and_dies(library: str) -> None:
    owned = Owned(CudaIpcTransport(SoftwareGpu(library)), BLOCK_BYTES, NUM_BLOCKS)
    landing = owned.expect("t", range(NUM_BLOCKS))
    with PeerProcess("write", f"cuda_ipc:{library}", owned.transport.describe().hex()) as peer:
        assert peer.says() == "done"
        until(lambda: landing.poll() == [b"done"], what="the notice")
        assert all(owned.block(i) == bytes([7]) * BLOCK_BYTES for i in range(NUM_BLOCKS))
        peer.signal(signal.SIGKILL)
        until(landing.peer_gone, 1.0, "the fence of a dead writer")
    owned.transport.close()


def test_an_owner_s_death_unmaps_its_memory_here(library: str, gpu: SoftwareGpu) -> None:
    sender = Owned(CudaIpcTransport(SoftwareGpu(library)), BLOCK_BYTES, NUM_BLOCKS, fill=9)
    with PeerProcess("own", f"cuda_ipc:{library}") as peer:
        description = bytes.fromhex(peer.says())
        endpoints = [sender.transport.connect(description) for _ in range(2)]
        for endpoint in endpoints:
            finish(endpoint.write("t", sender.blocks([0]), sender.blocks([0]), b"first"))
        assert gpu.count("opened") == 1, "one mapping however many connect"
        endpoints[0].close()
        finish(endpoints[1].write("t", sender.blocks([1]), sender.blocks([1])))
        until(lambda: peer.asks()["first"] == 9, what="the bytes are there")
        peer.signal(signal.SIGKILL)
        until(endpoints[1].failure, 1.0, "the endpoint fails")
        until(lambda: gpu.count("opened") == 0, 2.0, "the mapping is closed")
    endpoints[1].close()
    sender.transport.close()


def test_a_hundred_processes_worth_of_connections_leave_nothing_open(library: str, gpu: SoftwareGpu) -> None:
    sender = Owned(CudaIpcTransport(SoftwareGpu(library)), BLOCK_BYTES, NUM_BLOCKS, fill=9)
    with PeerProcess("own", f"cuda_ipc:{library}") as peer:
        description = bytes.fromhex(peer.says())
        for _ in range(100):
            endpoint = sender.transport.connect(description)
            finish(endpoint.write("t", sender.blocks([0]), sender.blocks([0])))
            endpoint.close()
        until(lambda: gpu.count("opened") == gpu.count("streams") == 0, what="mappings and streams go back")
        assert gpu.count("events") <= 2, "events are used again"
    sender.transport.close()


def test_memory_that_cannot_be_shared_is_refused_with_the_remedy(gpu: SoftwareGpu) -> None:
    transport = CudaIpcTransport(gpu)
    with pytest.raises(TransferError, match="not a GPU's: use shm or zmq"):
        transport.register(Region(0, ctypes.addressof(ctypes.create_string_buffer(4096)), 4096, 4096, 1))
    expandable = gpu.allocate(1 << 16, is_ipc_capable=False)
    transport.register(Region(0, expandable.address, 4096, 4096, 4))
    with pytest.raises(TransferError, match="start without expandable_segments"):
        transport.describe()
    with pytest.raises(TransferError, match="one GPU per process"):
        transport.register(Region(1, gpu.allocate(4096, gpu=1).address, 4096, 4096, 1))


def test_a_region_inside_an_allocation_is_found_and_one_across_two_is_refused(library: str, gpu: SoftwareGpu) -> None:
    sender, receiver = Owned(CudaIpcTransport(SoftwareGpu(library)), fill=5), CudaIpcTransport(gpu)
    memory = gpu.allocate(1 << 16)
    receiver.register(Region(0, memory.address + 4096 * 3, 4096, 4096, 8))
    endpoint = sender.transport.connect(receiver.describe())
    finish(endpoint.write("t", sender.blocks([1]), Blocks(0, (2,))))
    assert ctypes.string_at(memory.address + 4096 * 5, 4096) == bytes([5]) * 4096
    assert ctypes.string_at(memory.address + 4096 * 4, 4096) == bytes(4096)
    receiver.register(Region(1, memory.address + 4096, 4096, 4096, 16))
    with pytest.raises(TransferError, match="several allocations"):
        receiver.describe()
    endpoint.close()
    sender.transport.close()


def test_gpus_that_do_not_reach_each_other_say_so(library: str, gpu: SoftwareGpu) -> None:
    mine = gpu.allocate(4096)
    gpu.check(mine.address, 4096)
    there = gpu.allocate(4096, gpu=1)
    exported = msgspec.structs.replace(gpu.export(mine.address), device="41414141-4141-4141-4141-414141414141")
    assert there.num_bytes == 4096
    gpu.library.software_peer_access(0)
    with pytest.raises(TransferError, match="topo -p2p rw"):
        gpu.open(exported)
    gpu.library.software_peer_access(1)
    with pytest.raises(TransferError, match="share the process namespace"):
        gpu.open(exported)  # peers, but the handle was made in this process
    with pytest.raises(TransferError, match="64 bytes"):
        gpu.open(msgspec.structs.replace(exported, handle=b"short"))


def test_a_gpu_that_fails_ends_the_transfers_and_says_why(library: str, gpu: SoftwareGpu) -> None:
    sender = Owned(CudaIpcTransport(SoftwareGpu(library)), fill=1)
    receiver = Owned(CudaIpcTransport(SoftwareGpu(library)))
    endpoint = sender.transport.connect(receiver.transport.describe())
    finish(endpoint.write("t", sender.blocks([0]), receiver.blocks([0])))
    stream = gpu.library.software_compute_stream()
    gpu.library.software_hold(stream, 1)
    flying = endpoint.write("t", sender.blocks([1]), receiver.blocks([1]), b"never")
    gpu.library.software_fail(700)
    wait_for(lambda: flying.poll() is TransferState.FAILED, "the transfer ends")
    assert "cuEventQuery failed: CUDA_ERROR_700" in flying.failure()
    with pytest.raises(TransferError, match="700"):
        endpoint.write("t", sender.blocks([1]), receiver.blocks([1]))
    gpu.library.software_fail(0)
    gpu.library.software_hold(stream, 0)
    endpoint.close()
    for owned in (sender, receiver):
        owned.transport.close()
    _destroy(gpu, stream)


def test_cuda_that_was_started_before_a_fork_is_refused_with_the_remedy(library: str) -> None:
    script = """
import os, sys
from core.errors import ConfigError
from transport.cuda_driver import CudaDriver
CudaDriver(sys.argv[1])
if os.fork() == 0:
    try:
        CudaDriver(sys.argv[1])
    except ConfigError as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
"""
    words = subprocess.check_output([sys.executable, "-c", script, library], cwd=ROOT, text=True, timeout=20)
    assert "VLLM_WORKER_MULTIPROC_METHOD=spawn" in words


def test_a_machine_without_a_driver_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"the NVIDIA driver cannot be loaded: .*install or update it"):
        CudaDriver("libnothing.so.1")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        CudaDriver("libc.so.6")


def test_a_batch_takes_what_it_is_given_and_the_widest_unit_that_fits() -> None:
    assert ctypes.sizeof(Batch) == 4040, "an argument of a kernel has at most 4,096 bytes"
    region = Region(0, 1 << 20, 4096, 4096, 1 << 20)
    assert unit_of(Span(region, 0, 4096), Span(region, 16, 4096)) == 16
    assert unit_of(Span(region, 0, 4096), Span(region, 4, 4096)) == 4
    assert unit_of(Span(region, 0, 4095), Span(region, 0, 4095)) == 1
    batch = Batch()
    seen: list[tuple[int, int]] = []
    sources, targets = list(range(1100)), [7 + 3 * i for i in range(1100)]
    for launch in fill(batch, Span(region, 64, 1600), sources, Span(region, 0, 1600), targets):
        assert (launch.unit, launch.grid_x, batch.num_units) == (16, 1, 100)
        seen += zip(batch.source_ids[: launch.grid_y], batch.target_ids[: launch.grid_y], strict=True)
    assert seen == list(zip(sources, targets, strict=True))
    assert list(fill(batch, Span(region, 0, 4096), [], Span(region, 0, 4096), [])) == []
    with pytest.raises(TransferError, match="32 bits"):
        list(fill(batch, Span(region, 0, 4096), [1 << 32], Span(region, 0, 4096), [0]))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here, with which the kernel is compiled")
def test_the_kernel_in_the_package_is_the_one_in_the_source() -> None:
    assert compile_ptx() == PTX.read_text(), "run python -m transport.cuda_kernels"


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="no ptxas here, which knows the GPUs")
@pytest.mark.parametrize("gpu_name", ["sm_75", "sm_80", "sm_90", "sm_100"])
def test_the_kernel_is_code_for_this_gpu(gpu_name: str) -> None:
    command = ["ptxas", f"-arch={gpu_name}", "-v", str(PTX), "-o", os.devnull]
    words = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stderr
    assert words.count(" 0 bytes spill stores") == 4


def _destroy(gpu: SoftwareGpu, *streams: int) -> None:
    """The engine's streams end with it."""
    for stream in streams:
        gpu.library.software_end(stream)


def test_memory_of_the_host_is_pinned_in_pieces_that_drivers_take(
    gpu: SoftwareGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_pinned, "PIECE_BYTES", 4096)
    gpu.take(0)
    pages = mmap.mmap(-1, 5 * 4096)
    anchor = ctypes.c_char.from_buffer(pages)
    address = ctypes.addressof(anchor)
    gpu.library.software_pin_at_most(4096)
    assert gpu.pin(address, 5 * 4096) == address
    assert gpu.count("pinned") == 5
    gpu.unpin(address)
    assert gpu.count("pinned") == 0
    gpu.library.software_pin_at_most(4095)
    with pytest.raises(
        TransferError, match=r"20480 bytes of the host's memory cannot be pinned for the GPU.*not enough memory"
    ):
        gpu.pin(address, 5 * 4096)
    gpu.library.software_pin_at_most(0)
    assert gpu.pin(address, 4096) == address  # what was refused is not taken for pinned
    for first in (address - 4096, address):
        with pytest.raises(TransferError, match="pinned already"):
            gpu.pin(first, 3 * 4096)
    assert gpu.count("pinned") == 1
    gpu.unpin(address)
    del anchor
    pages.close()
