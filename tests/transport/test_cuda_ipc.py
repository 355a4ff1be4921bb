"""cuda_ipc's rules, on a device made of host memory: order behind the computation, fences, deaths, lies.

What only a GPU can show is in test_cuda_ipc_gpu.py; that the CUDA calls are made as they should be, in
test_cuda_ipc_driver.py.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec
import pytest

from core.errors import ConfigError, TransferError
from tests.poll import until
from tests.transport.memory import Owned, connected
from tests.transport.peer_process import NUM_BLOCKS, ROOT, PeerProcess
from transport import cuda_ipc, cuda_ipc_endpoint
from transport.base import Endpoint, Region, Transfer, TransferState
from transport.conformance import check_transport
from transport.conformance_pair import QUIET_S, finish, wait_for
from transport.cuda_device import why_unavailable
from transport.cuda_ipc import CudaIpcTransport
from transport.cuda_ipc_wire import CudaIpcDescription, decode_description, encode_description
from transport.device import Exported
from transport.faulty import Faults, FaultyTransport
from transport.host_device import HostDevice
from transport.schemes import SCHEMES, is_reachable, make_transport, unavailable
from transport.shm import ShmTransport

BLOCK_BYTES = 1 << 19


def host_transport() -> CudaIpcTransport:
    return CudaIpcTransport(HostDevice())


def pair(device: HostDevice | None = None) -> AbstractContextManager[tuple[Owned, Owned, Endpoint]]:
    """See `connected`. device: the sender's."""
    return connected(CudaIpcTransport(device or HostDevice()), host_transport())


def is_running(transfer: Transfer) -> bool:
    return transfer.poll() is TransferState.RUNNING


def has_ended(transfer: Transfer) -> bool:
    return not is_running(transfer)


def test_it_does_what_every_transport_must() -> None:
    check_transport(host_transport)


def test_it_still_does_when_completion_is_delayed() -> None:
    check_transport(lambda: FaultyTransport(host_transport(), Faults(delay_polls=3, delay_s=0.002)))


def test_a_write_takes_what_the_layer_has_computed_and_not_what_lay_there_before() -> None:
    device = HostDevice()
    with pair(device) as (sender, receiver, endpoint):
        landing = receiver.expect("t", range(8))
        finish(endpoint.write("t", sender.blocks([7]), receiver.blocks([7])))
        device.hold()
        transfer = endpoint.write("t", sender.blocks([0, 1]), receiver.blocks([2, 3]), b"done")
        assert is_running(transfer)
        assert receiver.block(2)[0] == 0, "copied before the layer was computed"
        _fill(sender, 0, 42)
        device.let_go()
        finish(transfer)
        until(lambda: landing.poll() == [b"done"], what="the notice")
        assert receiver.block(2) == bytes([42]) * 4096
        assert receiver.block(3) == bytes([1]) * 4096


def test_the_notice_follows_without_anyone_asking_the_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_ipc_endpoint, "IDLE_PAUSE_S", 60.0)
    device = HostDevice()
    with pair(device) as (sender, receiver, endpoint):
        landing = receiver.expect("t", range(8))
        finish(endpoint.write("t", sender.blocks([0]), receiver.blocks([0])))
        threading.Event().wait(QUIET_S)  # the endpoint's thread has gone to sleep
        device.hold()
        endpoint.write("t", sender.blocks([0]), receiver.blocks([0]), b"alone")
        assert landing.poll() == []
        device.let_go()
        until(lambda: landing.poll() == [b"alone"], what="the notice behind a copy that nobody polls")


def test_a_cancelled_copy_that_the_device_has_is_running_until_it_has_landed() -> None:
    device = HostDevice()
    with pair(device) as (sender, receiver, endpoint):
        landing = receiver.expect("t", range(8))
        finish(endpoint.write("t", sender.blocks([7]), receiver.blocks([7])))
        device.hold()
        transfer = endpoint.write("t", sender.blocks([0]), receiver.blocks([0]), b"never")
        transfer.cancel()
        assert is_running(transfer), "its source may not be given away while the device can still read it"
        device.let_go()
        finish(transfer, state=TransferState.FAILED)
        assert transfer.failure() == "cancelled"
        finish(endpoint.write("t", sender.blocks([1]), receiver.blocks([1]), b"next"))
        until(lambda: landing.poll() == [b"next"], what="the next notice, without the cancelled one's")


def test_close_waits_for_the_device_and_then_nothing_writes() -> None:
    device = HostDevice()
    with pair(device) as (sender, receiver, endpoint):
        landing = receiver.expect("t", range(8))
        finish(endpoint.write("t", sender.blocks([7]), receiver.blocks([7])))
        device.hold()
        transfer = endpoint.write("t", sender.blocks([0]), receiver.blocks([0]), b"late")
        closing = threading.Thread(target=endpoint.close)
        closing.start()
        until(endpoint.failure, what="the endpoint refuses")
        assert is_running(transfer)
        assert not landing.peer_gone(), "the owner's fence fell although the device may still write"
        device.let_go()
        closing.join(5.0)
        assert not closing.is_alive()
        assert transfer.poll() is TransferState.FAILED
        until(landing.peer_gone, 1.0, "the fence of a closed endpoint")
        assert landing.poll() == []


def test_a_device_that_fails_ends_everything_that_was_given_to_it() -> None:
    device = HostDevice()
    with pair(device) as (sender, receiver, endpoint):
        finish(endpoint.write("t", sender.blocks([7]), receiver.blocks([7])))
        device.hold()
        transfers = [endpoint.write("t", sender.blocks([i]), receiver.blocks([i]), b"n") for i in range(3)]
        device.fail("an illegal memory access was encountered")
        finish(*transfers, state=TransferState.FAILED)
        assert "illegal memory access" in transfers[0].failure()
        assert "illegal memory access" in endpoint.failure()


def test_another_process_writes_and_its_death_is_seen_at_once() -> None:
    owned = Owned(host_transport(), BLOCK_BYTES, NUM_BLOCKS)
    landing = owned.expect("t", range(NUM_BLOCKS))
    with PeerProcess("write", "cuda_ipc", owned.transport.describe().hex()) as peer:
        assert peer.says() == "done"
        until(lambda: landing.poll() == [b"done"], what="the notice")
        assert all(owned.block(i) == bytes([7]) * BLOCK_BYTES for i in range(NUM_BLOCKS))
        assert landing.close() is False, "one-sided: a landing cannot refuse"
        assert not landing.peer_gone()
        peer.signal(signal.SIGKILL)
        until(landing.peer_gone, 1.0, "the fence of a dead writer")
    owned.transport.close()


def test_a_writer_killed_in_mid_write_sends_no_notice_and_its_fence_falls() -> None:
    owned = Owned(host_transport(), BLOCK_BYTES, NUM_BLOCKS)
    landing = owned.expect("t", range(NUM_BLOCKS))
    with PeerProcess("held", owned.transport.describe().hex()) as peer:
        assert peer.says() == "running"
        until(lambda: landing.poll() == [b"first"], what="the first notice")
        peer.signal(signal.SIGKILL)
        until(landing.peer_gone, 1.0, "the fence of a dead writer")
        assert landing.poll() == []
        assert owned.block(1) == bytes(BLOCK_BYTES)
    owned.transport.close()


def test_an_owner_killed_in_mid_write_fails_the_write_once_the_device_is_done_with_it() -> None:
    device = HostDevice()
    sender = Owned(CudaIpcTransport(device), BLOCK_BYTES, NUM_BLOCKS, fill=9)
    with PeerProcess("own", "cuda_ipc") as peer:
        endpoint = sender.transport.connect(bytes.fromhex(peer.says()))
        finish(endpoint.write("t", sender.blocks([0]), sender.blocks([0]), b"first"))
        until(lambda: peer.asks()["notices"] == ["first"], what="the notice")
        assert peer.asks()["first"] == 9
        device.hold()
        flying = endpoint.write("t", sender.blocks([1]), sender.blocks([1]), b"second")
        peer.signal(signal.SIGKILL)
        until(endpoint.failure, 1.0, "the endpoint fails")
        assert is_running(flying), "the device still has it"
        assert endpoint.write("t", sender.blocks([2]), sender.blocks([2])).poll() is TransferState.FAILED
        device.let_go()
        finish(flying, state=TransferState.FAILED)
    until(lambda: _num_mappings() == 1, 2.0, "the dead owner's memory is let go")
    endpoint.close()
    sender.transport.close()


def test_a_restarted_owner_is_another_one() -> None:
    sender = Owned(host_transport(), BLOCK_BYTES, NUM_BLOCKS, fill=3)
    with PeerProcess("own", "cuda_ipc") as peer:
        stale = bytes.fromhex(peer.says())
        peer.signal(signal.SIGKILL)
    with PeerProcess("own", "cuda_ipc") as peer:
        fresh = bytes.fromhex(peer.says())
        lost, found = sender.transport.connect(stale), sender.transport.connect(fresh)
        waiting = lost.write("t", sender.blocks([0]), sender.blocks([0]))
        until(lost.failure, 1.0, "the stale description leads nowhere")
        assert waiting.poll() is TransferState.FAILED
        finish(found.write("t", sender.blocks([0]), sender.blocks([0]), b"here"))
        until(lambda: peer.asks()["notices"] == ["here"], what="the notice")
        lost.close()
        found.close()
    sender.transport.close()


def test_a_stopped_owner_blocks_no_write_and_hears_everything_later() -> None:
    sender = Owned(host_transport(), BLOCK_BYTES, NUM_BLOCKS, fill=5)
    with PeerProcess("own", "cuda_ipc") as peer:
        endpoint = sender.transport.connect(bytes.fromhex(peer.says()))
        finish(endpoint.write("t", sender.blocks([0]), sender.blocks([0])))
        peer.signal(signal.SIGSTOP)
        notice = b"n" * 10_000
        transfers = [endpoint.write("t", sender.blocks([1]), sender.blocks([1]), notice) for _ in range(100)]
        assert is_running(transfers[-1])
        peer.signal(signal.SIGCONT)
        finish(*transfers)
        until(lambda: len(peer.asks()["notices"]) == 100, what="all notices")
    endpoint.close()
    sender.transport.close()


def test_a_listener_that_accepts_and_says_nothing_holds_nobody_up() -> None:
    sender, receiver = Owned(host_transport(), fill=1), Owned(host_transport())
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as mute:
        mute.bind(b"\0" + b"baton-mute")
        mute.listen(1)
        true = decode_description(receiver.transport.describe())
        silent = msgspec.structs.replace(true, socket="baton-mute")
        endpoint = sender.transport.connect(encode_description(silent))
        transfer = endpoint.write("t", sender.blocks([0]), receiver.blocks([0]), b"n")
        assert is_running(transfer)
        endpoint.close()
        assert transfer.poll() is TransferState.FAILED
    until(lambda: "baton-cuda-ipc" not in _threads(), 5.0, "its thread ends with the listener")
    for owned in (sender, receiver):
        owned.transport.close()


def test_descriptions_that_lie_are_refused_and_say_why() -> None:
    sender, receiver = Owned(host_transport()), Owned(host_transport())
    true = decode_description(receiver.transport.describe())
    lies: list[tuple[CudaIpcDescription, str]] = [
        (msgspec.structs.replace(true, host="elsewhere"), "--pid"),
        (msgspec.structs.replace(true, uid=true.uid + 1), "same user"),
        (msgspec.structs.replace(true, cuda_ipc=2), "version 2 of cuda_ipc, we 1"),
        (msgspec.structs.replace(true, memories=[4096]), "outside the described memory"),
        (msgspec.structs.replace(true, devices=[]), "some memories only"),
        (msgspec.structs.replace(true, regions=[true.regions[0]] * 2), "twice"),
        (_with_region(true, num_blocks=1 << 40), "outside"),
        (_with_region(true, stride=1), "not an array"),
        (_with_region(true, memory=1), "outside"),
    ]
    for lie, why in lies:
        with pytest.raises(TransferError, match=why):
            sender.transport.connect(encode_description(lie))
    for wrong in (
        msgspec.structs.replace(true, memories=[1 << 30]),
        msgspec.structs.replace(true, devices=["another GPU"]),
        msgspec.structs.replace(true, socket="nobody"),
    ):
        endpoint = sender.transport.connect(encode_description(wrong))
        waiting = endpoint.write("t", sender.blocks([0]), receiver.blocks([0]))
        until(endpoint.failure, 2.0, "an endpoint that cannot be has failed")
        assert waiting.poll() is TransferState.FAILED
        endpoint.close()
    for owned in (sender, receiver):
        owned.transport.close()


def test_another_model_s_description_refuses_writes_of_another_shape() -> None:
    sender, receiver = Owned(host_transport(), 4096), Owned(host_transport(), 2048)
    endpoint = sender.transport.connect(receiver.transport.describe())
    with pytest.raises(TransferError, match="4096 local and 2048 remote"):
        endpoint.write("t", sender.blocks([0]), receiver.blocks([0]))
    endpoint.close()
    for owned in (sender, receiver):
        owned.transport.close()


def test_an_owner_of_shm_does_not_pass_for_one_of_gpu_memory() -> None:
    sender, receiver, shm = Owned(host_transport()), Owned(host_transport()), Owned(ShmTransport())
    with pytest.raises(TransferError, match="not a cuda_ipc description"):
        sender.transport.connect(shm.transport.describe())
    mine = decode_description(receiver.transport.describe())
    name = msgspec.msgpack.decode(shm.transport.describe())["socket"]
    endpoint = sender.transport.connect(encode_description(msgspec.structs.replace(mine, socket=name)))
    until(lambda: "does not speak cuda_ipc" in endpoint.failure(), 2.0, "the shm owner's greeting is refused")
    endpoint.close()
    for owned in (sender, receiver, shm):
        owned.transport.close()


def test_memory_is_opened_in_another_process_only_and_only_while_its_owner_lives() -> None:
    device = HostDevice()
    memory = device.allocate(4096)
    exported = device.export(memory.address + 100)
    assert (exported.address, exported.num_bytes) == (memory.address, 4096)
    with pytest.raises(TransferError, match="in the process that made it"):
        device.open(exported)
    with pytest.raises(TransferError):
        device.open(msgspec.structs.replace(exported, handle=b"garbage"))
    with pytest.raises(TransferError, match="allocate it there"):
        device.export(memory.address + 4096)
    assert "the other process wrote" in _in_another_process(exported)
    assert ctypes.string_at(memory.address, 22) == b"from the other process"
    device.close()
    assert "the peer's memory" in _in_another_process(exported)


def test_a_region_that_cannot_be_exported_is_named_when_it_is_described() -> None:
    owned = Owned(host_transport())
    stray = HostDevice().allocate(4096)
    owned.transport.register(Region(1, stray.address, 4096, 4096, 1))
    with pytest.raises(TransferError, match="allocate it there"):
        owned.transport.describe()
    owned.transport.close()


def test_the_scheme_is_registered_and_says_why_it_cannot_run_here() -> None:
    assert "cuda_ipc" in SCHEMES
    receiver = Owned(host_transport())
    assert is_reachable("cuda_ipc", receiver.transport.describe())
    assert not is_reachable("cuda_ipc", b"garbage")
    receiver.transport.close()
    if why := unavailable("cuda_ipc"):
        with pytest.raises(ConfigError, match="not available here"):
            make_transport("cuda_ipc", "127.0.0.1")
        assert "NVIDIA driver" in why or "GPU" in why or "torch" in why


@pytest.mark.parametrize(
    ("has_driver", "has_gpu", "torch", "remedy"),
    [
        (False, False, "2.13.0+cpu", "install one, or use shm or zmq"),
        (True, False, "2.13.0", "--gpus all"),
        (True, True, "2.13.0+cpu", r"2\.13\.0\+cpu has no CUDA: install baton-serve\[gpu\]"),
        (True, True, "", r"not installed.*baton-serve\[gpu\]"),
        (True, True, "2.13.0", ""),
        (True, True, "2.13.0+cu130", ""),
    ],
)
def test_what_is_missing_is_said_with_its_remedy(has_driver: bool, has_gpu: bool, torch: str, remedy: str) -> None:
    why = why_unavailable(has_driver, has_gpu, torch)
    assert bool(why) == bool(remedy)
    if remedy:
        with pytest.raises(ConfigError, match=remedy):
            raise ConfigError(why)


def test_asking_whether_it_is_available_starts_no_cuda() -> None:
    script = "import transport.cuda_ipc as c; c.unavailable(); import sys; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", script], cwd=ROOT, text=True).strip() == "False"
    assert importlib.metadata.version("torch")


def test_it_is_never_chosen_by_itself_before_it_was_measured() -> None:
    assert cuda_ipc.MEASURED is False, "a results file with a GPU's figures belongs beside this"


def test_a_thousand_connections_come_and_go_without_a_trace() -> None:
    sender = Owned(host_transport(), BLOCK_BYTES, NUM_BLOCKS, fill=1)
    with PeerProcess("own", "cuda_ipc") as peer:
        description = bytes.fromhex(peer.says())
        before = _num_open()
        for turn in range(1000):
            endpoint = sender.transport.connect(description)
            if turn % 10 == 0:
                finish(endpoint.write("t", sender.blocks([0]), sender.blocks([0])))
            endpoint.close()
        until(lambda: _num_open() <= before, what="descriptors, threads and mappings go back")
        assert peer.asks()["first"] == 1
    sender.transport.close()


def test_a_storm_of_cancels_never_writes_into_blocks_that_were_given_away() -> None:
    """Blocks are filled anew as soon as their transfer says that it has ended; nothing may change them after that."""
    with pair() as (sender, receiver, endpoint):
        finish(endpoint.write("t", sender.blocks([0]), receiver.blocks([0])))
        for turn in range(200):
            block = turn % 8
            transfer = endpoint.write("t", sender.blocks([block]), receiver.blocks([block]))
            transfer.cancel()
            wait_for(functools.partial(has_ended, transfer), "a cancelled transfer ends")
            _fill(receiver, block, 200)
            digest = receiver.digest([block])
            finish(endpoint.write("t", sender.blocks([(block + 1) % 8]), receiver.blocks([(block + 1) % 8])))
            assert receiver.digest([block]) == digest, "a cancelled copy wrote later"


def _with_region(description: CudaIpcDescription, **changes: int) -> CudaIpcDescription:
    return msgspec.structs.replace(description, regions=[msgspec.structs.replace(description.regions[0], **changes)])


def _fill(owned: Owned, block: int, byte: int) -> None:
    """As a computation would."""
    ctypes.memset(owned.region.address + block * owned.region.stride, byte, owned.region.block_bytes)


def _in_another_process(exported: Exported) -> str:
    """What a fresh process says that opens the memory, writes into it, and lets it go."""
    script = """
import ctypes, sys, msgspec
from core.errors import TransferError
from transport.device import Exported
from transport.host_device import HostDevice
device = HostDevice()
try:
    address = device.open(msgspec.json.decode(sys.argv[1], type=Exported))
except TransferError as error:
    sys.exit(print(error))
ctypes.memmove(address, b"from the other process", 22)
device.shut(address)
print("the other process wrote")
"""
    wire = msgspec.json.encode(exported).decode()
    return subprocess.check_output([sys.executable, "-c", script, wire], cwd=ROOT, text=True, timeout=20)


def _num_mappings() -> int:
    return Path("/proc/self/maps").read_text().count("baton-kv")


def _num_open() -> tuple[int, int, int]:
    return len(os.listdir("/proc/self/fd")), threading.active_count(), _num_mappings()


def _threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}
