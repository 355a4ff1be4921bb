"""UCX: the contract, real second processes, peers that die, stop, lie or say nothing; what stays bounded."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest

from core.clock import ManualClock, SystemClock
from core.errors import ConfigError, TransferError
from tests.poll import until
from tests.transport.memory import Owned
from tests.transport.peer_process import BLOCK_BYTES, NUM_BLOCKS, ROOT, PeerProcess
from tests.transport.ucx_stranger import num_rooms_lent
from transport import schemes, ucx_library
from transport.base import TransferState
from transport.conformance import check_transport
from transport.conformance_pair import finish
from transport.faulty import Faults, FaultyTransport
from transport.ucx import UcxTransport
from transport.ucx_wire import decode_description, encode, encode_greeting, hello

pytestmark = [
    pytest.mark.ucx,
    pytest.mark.skipif(bool(schemes.unavailable("ucx")), reason=schemes.unavailable("ucx")),
]


def make() -> UcxTransport:
    return UcxTransport("127.0.0.1")


class HastyClock(SystemClock):
    """Eight times as fast: the two seconds for which early frames are kept pass sooner."""

    def monotonic_s(self) -> float:
        return super().monotonic_s() * 8


def make_hasty() -> UcxTransport:
    return UcxTransport("127.0.0.1", HastyClock())


def test_it_does_what_every_transport_must() -> None:
    check_transport(make_hasty)


def test_it_still_does_when_completion_is_delayed() -> None:
    check_transport(lambda: FaultyTransport(make_hasty(), Faults(delay_polls=3, delay_s=0.002)))


def test_random_bytes_reach_another_process_whole() -> None:
    sender = Owned(make(), BLOCK_BYTES, NUM_BLOCKS)
    content = random.Random(8).randbytes(BLOCK_BYTES * NUM_BLOCKS)
    ctypes.memmove(sender.region.address, content, len(content))
    ids = random.Random(9).sample(range(NUM_BLOCKS), NUM_BLOCKS)
    with PeerProcess("own", "ucx") as peer:
        endpoint = sender.transport.connect(bytes.fromhex(peer.says()))
        finish(*[endpoint.write("t", sender.blocks([i]), sender.blocks([i])) for i in ids])
        finish(endpoint.write("t", sender.blocks([]), sender.blocks([]), b"done"))
        said = peer.asks()
        assert said["written"] == NUM_BLOCKS
        assert said["digest"] == sender.digest(range(NUM_BLOCKS))
        assert said["notices"] == ["done"]
    endpoint.close()
    sender.transport.close()


def test_a_receiver_killed_in_mid_write_fails_the_endpoint_for_good() -> None:
    sender = Owned(make(), BLOCK_BYTES, NUM_BLOCKS, fill=4)
    with PeerProcess("own", "ucx") as peer:
        endpoint = sender.transport.connect(bytes.fromhex(peer.says()))
        finish(endpoint.write("t", sender.blocks([0]), sender.blocks([0])))
        peer.signal(signal.SIGSTOP)
        running = [endpoint.write("t", sender.blocks(range(16)), sender.blocks(range(16))) for _ in range(4)]
        assert running[-1].poll() is TransferState.RUNNING
        peer.signal(signal.SIGKILL)
        until(endpoint.failure, 5.0, "the endpoint fails")
        finish(*running, state=TransferState.FAILED)
        finish(endpoint.write("t", sender.blocks([0]), sender.blocks([0])), state=TransferState.FAILED)
    endpoint.close()
    sender.transport.close()


def test_a_sender_killed_in_mid_write_leaves_a_fence_a_working_transport_and_nothing_else() -> None:
    receiver, other = Owned(make(), BLOCK_BYTES, NUM_BLOCKS), Owned(make(), BLOCK_BYTES, NUM_BLOCKS, fill=9)
    endpoint = other.transport.connect(receiver.transport.describe())
    before = 0
    for turn in range(3):
        landing = receiver.expect("t", range(NUM_BLOCKS))
        with PeerProcess("pour", "ucx", receiver.transport.describe().hex()) as peer:
            assert peer.says() == "done"
            assert landing.num_written() == NUM_BLOCKS
            peer.signal(signal.SIGKILL)
        assert landing.close() is True
        ctypes.memset(receiver.region.address, 0, BLOCK_BYTES * NUM_BLOCKS)
        proper = receiver.expect("proper", [1])
        finish(endpoint.write("proper", other.blocks([1]), receiver.blocks([1])))
        assert proper.digest() == other.digest([1])
        proper.close()
        assert receiver.block(0) == bytes(BLOCK_BYTES), "a dead sender's bytes came into a closed landing"
        if turn == 0:
            before = _num_open()
        until(lambda: num_rooms_lent(receiver) == 0, what="rooms that waited for a dead sender are free again")
    until(lambda: _num_open() <= before, what="descriptors and threads of dead peers go")
    endpoint.close()
    for owned in (receiver, other):
        owned.transport.close()


def test_a_peer_that_restarted_under_the_same_address_refuses_the_old_description() -> None:
    sender, old, new = Owned(make(), fill=6), Owned(make()), Owned(make())
    before = decode_description(old.transport.describe())
    old.transport.close()
    address = decode_description(new.transport.describe()).address
    new.expect("t", [0])
    endpoint = sender.transport.connect(encode(msgspec.structs.replace(before, address=address)))
    transfer = endpoint.write("t", sender.blocks([0]), new.blocks([0]))
    until(endpoint.failure, 5.0, "the restarted peer refuses")
    assert "token" in endpoint.failure()
    assert "earlier boot" in endpoint.failure()
    finish(transfer, state=TransferState.FAILED)
    assert new.block(0)[0] == 0
    fresh = sender.transport.connect(new.transport.describe())
    finish(fresh.write("t", sender.blocks([0]), new.blocks([0])))
    for each in (endpoint, fresh):
        each.close()
    for owned in (sender, new):
        owned.transport.close()


def test_a_peer_that_is_gone_is_noticed_soon() -> None:
    sender, receiver = Owned(make()), Owned(make())
    description = receiver.transport.describe()
    receiver.transport.close()
    endpoint = sender.transport.connect(description)
    until(endpoint.failure, 5.0, "connecting is refused")
    endpoint.close()
    sender.transport.close()


def test_a_listener_that_accepts_and_says_nothing_has_ten_seconds() -> None:
    clock = ManualClock()
    sender = Owned(UcxTransport("127.0.0.1", clock), fill=6)
    known = decode_description(sender.transport.describe())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        endpoint = sender.transport.connect(encode(msgspec.structs.replace(known, address=address)))
        transfer = endpoint.write("t", sender.blocks([0]), sender.blocks([0]))
        connection, _ = listener.accept()
        connection.settimeout(5.0)
        assert connection.recv(8) == b"BatonUCX"
        clock.advance(9)
        assert endpoint.failure() == ""
        clock.advance(2)
        until(endpoint.failure, 5.0, "the deadline passes")
        assert "within 10 s" in endpoint.failure()
        finish(transfer, state=TransferState.FAILED)
        connection.close()
    endpoint.close()
    sender.transport.close()


def test_a_connected_peer_that_answers_nothing_any_more_has_ten_seconds() -> None:
    """As on a connection whose other half is gone: the kernel still takes our bytes, nobody reads them."""
    clock = ManualClock()
    sender = Owned(UcxTransport("127.0.0.1", clock), BLOCK_BYTES, NUM_BLOCKS, fill=6)
    with PeerProcess("own", "ucx") as peer:
        endpoint = sender.transport.connect(bytes.fromhex(peer.says()))
        finish(endpoint.write("t", sender.blocks([0]), sender.blocks([0])))
        peer.signal(signal.SIGSTOP)
        transfers = [endpoint.write("t", sender.blocks(range(16)), sender.blocks(range(16))) for _ in range(8)]
        until(lambda: _num_in_flight(endpoint) > 0, what="frames are under way")
        transfers[0].cancel()
        transfers[-1].cancel()
        finish(transfers[-1], state=TransferState.FAILED)
        assert transfers[0].poll() is TransferState.RUNNING, "its frames under way could still land"
        clock.advance(9)
        assert endpoint.failure() == ""
        clock.advance(2)
        until(endpoint.failure, 5.0, "the deadline passes")
        finish(*transfers, state=TransferState.FAILED)
    endpoint.close()
    sender.transport.close()


def test_a_stopped_peer_bounds_its_memory_and_holds_up_nobody_else() -> None:
    sender, other = Owned(make(), BLOCK_BYTES, NUM_BLOCKS, fill=4), Owned(make(), BLOCK_BYTES, NUM_BLOCKS)
    ids = range(NUM_BLOCKS)
    with PeerProcess("own", "ucx") as peer:
        stuck = sender.transport.connect(bytes.fromhex(peer.says()))
        finish(stuck.write("t", sender.blocks(ids), sender.blocks(ids)))
        peer.signal(signal.SIGSTOP)
        before = _resident_bytes()
        transfers = [stuck.write("t", sender.blocks(ids), sender.blocks(ids)) for _ in range(20)]
        other.expect("t", ids)
        free = sender.transport.connect(other.transport.describe())
        finish(*[free.write("t", sender.blocks(ids), other.blocks(ids)) for _ in range(3)])
        assert transfers[-1].poll() is TransferState.RUNNING
        assert _resident_bytes() - before < 60 << 20, "160 MiB wait, of which at most a window may be in memory"
        peer.signal(signal.SIGCONT)
        finish(*transfers)
        assert peer.asks()["written"] == NUM_BLOCKS
    for endpoint in (stuck, free):
        endpoint.close()
    for owned in (sender, other):
        owned.transport.close()


def test_writes_that_come_before_they_are_expected_are_kept_for_a_while_in_order() -> None:
    clock = ManualClock()
    sender, receiver = Owned(make(), fill=6), Owned(UcxTransport("127.0.0.1", clock))
    endpoint = sender.transport.connect(receiver.transport.describe())
    early = [
        endpoint.write("t", sender.blocks([0, 1]), receiver.blocks([0, 1])),
        endpoint.write("t", sender.blocks([2]), receiver.blocks([2]), b"end"),
    ]
    until(lambda: _num_parked(receiver) == 2, what="a parcel and a notice are parked")
    clock.advance(3)
    receiver.transport._io.wake()  # type: ignore[attr-defined]
    finish(*early, state=TransferState.FAILED)
    again = endpoint.write("t", sender.blocks([0, 1, 2]), receiver.blocks([0, 1, 2]), b"end")
    until(lambda: _num_parked(receiver) == 2, what="frames are parked")
    landing = receiver.expect("t", [0, 1, 2])
    finish(again)
    assert landing.poll() == [b"end"]
    assert landing.digest() == sender.digest([0, 1, 2])
    endpoint.close()
    for owned in (sender, receiver):
        owned.transport.close()


def test_another_version_is_refused_with_both_values() -> None:
    sender, receiver = Owned(make()), Owned(make())
    known = decode_description(receiver.transport.describe())
    with pytest.raises(TransferError, match="version 9 of the ucx protocol, this side version 3"):
        sender.transport.connect(encode(msgspec.structs.replace(known, version=9)))
    host, port = known.address.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port)), 5.0) as stranger:
        stranger.settimeout(5.0)
        stranger.sendall(encode_greeting(hello(known.token, b"address", 1), version=9))
        answer = b"".join(iter(lambda: stranger.recv(4096), b""))
    assert b"version 9 of the ucx protocol, this side version 3" in answer
    with pytest.raises(TransferError, match="'zmq' is not one of ucx"):
        sender.transport.connect(encode(msgspec.structs.replace(known, scheme="zmq")))
    for owned in (sender, receiver):
        owned.transport.close()


def test_a_description_of_another_shape_is_refused_by_whoever_sees_it() -> None:
    sender, receiver = Owned(make(), fill=6), Owned(make(), block_bytes=8192)
    receiver.expect("t", [0])
    endpoint = sender.transport.connect(receiver.transport.describe())
    with pytest.raises(TransferError, match="4096 local and 8192 remote bytes differ"):
        endpoint.write("t", sender.blocks([0]), receiver.blocks([0]))
    known = decode_description(receiver.transport.describe())
    shapes = [msgspec.structs.replace(known.regions[0], block_bytes=4096, num_blocks=100)]
    liar = sender.transport.connect(encode(msgspec.structs.replace(known, regions=shapes)))
    transfer = liar.write("t", sender.blocks([0]), sender.blocks([50]))
    finish(transfer, state=TransferState.FAILED)
    assert "outside own region 0 of 8 blocks" in transfer.failure()
    for each in (endpoint, liar):
        each.close()
    for owned in (sender, receiver):
        owned.transport.close()


def test_fifty_connections_come_and_go_without_a_trace() -> None:
    sender, receiver = Owned(make(), fill=1), Owned(make())
    description = receiver.transport.describe()
    receiver.expect("t", [0])
    for _ in range(3):
        _use(sender, receiver, description)
    before, resident = _num_open(), _resident_bytes()
    for _ in range(50):
        _use(sender, receiver, description)
    until(lambda: _num_open() <= before, what="nothing stays")
    assert _resident_bytes() - resident < 16 << 20
    for owned in (sender, receiver):
        owned.transport.close()


def test_an_idle_transport_sleeps() -> None:
    sender, receiver = Owned(make(), fill=1), Owned(make())
    receiver.expect("t", [0])
    endpoint = sender.transport.connect(receiver.transport.describe())
    finish(endpoint.write("t", sender.blocks([0]), receiver.blocks([0])))
    threads = [each.native_id for each in threading.enumerate() if each.name == "baton-ucx"]
    assert len(threads) == 2
    until(lambda: all(_sleeps(each) for each in threads for _ in range(100)), what="both threads sleep")
    endpoint.close()
    for owned in (sender, receiver):
        owned.transport.close()


def test_it_listens_on_the_address_of_its_host_alone() -> None:
    sender, receiver = Owned(make(), fill=1), Owned(make())
    receiver.expect("t", [0])
    endpoint = sender.transport.connect(receiver.transport.describe())
    finish(endpoint.write("t", sender.blocks([0]), receiver.blocks([0])))
    assert _listening() == {"0100007F"}, "127.0.0.1, as /proc writes it"
    endpoint.close()
    for owned in (sender, receiver):
        owned.transport.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "", "no-such-host.invalid", "203.0.113.7"])
def test_a_host_that_peers_cannot_reach_is_a_config_error(host: str) -> None:
    with pytest.raises(ConfigError):
        UcxTransport(host)


def test_a_missing_library_is_a_reason_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ucx_library, "find_spec", lambda name: None)
    assert "ucxx is not installed" in schemes.unavailable("ucx")
    with pytest.raises(ConfigError, match="pip install"):
        schemes.make_transport("ucx", "127.0.0.1")


def test_the_environment_stays_as_the_user_left_it() -> None:
    program = """
import os
os.environ["UCX_RNDV_THRESH"] = "64k"
os.environ["UCX_RNDV_SCHEME"] = "auto"
before = dict(os.environ)
from transport.schemes import make_transport
transport = make_transport("ucx", "127.0.0.1")
assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())
assert "64K" in transport._lease.context.config["RNDV_THRESH"], "the user's variable wins"
assert transport._lease.context.config["RNDV_SCHEME"] == "get_zcopy", "but for what would crash UCX"
transport.close()
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("UCX_")}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=clean, check=True, timeout=60)


def _use(sender: Owned, receiver: Owned, description: bytes) -> None:
    endpoint = sender.transport.connect(description)
    finish(endpoint.write("t", sender.blocks([0]), receiver.blocks([0])))
    endpoint.close()


def _num_open() -> int:
    return len(os.listdir("/proc/self/fd")) + threading.active_count()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def _sleeps(thread_id: int | None) -> bool:
    return Path(f"/proc/self/task/{thread_id}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def _listening() -> set[str]:
    """Addresses on which this process listens, as /proc/net/tcp writes them."""
    links = [os.readlink(each) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    inodes = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:[")}
    rows = [line.split() for path in ("tcp", "tcp6") for line in Path(f"/proc/net/{path}").read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


def _num_in_flight(endpoint: object) -> int:
    return len(endpoint._link._window.frames)  # type: ignore[attr-defined]


def _num_parked(owned: Owned) -> int:
    parking = owned.transport._io._parts.receiver.parking  # type: ignore[attr-defined]
    return int(parking._num_frames)


def test_its_thread_runs_beside_the_engine_and_not_on_the_core_that_computes() -> None:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        transport = make()
        (thread,) = [each for each in threading.enumerate() if each.name == "baton-ucx"]
        until(lambda: os.sched_getaffinity(thread.native_id or 0) >= cores, what="all of the process's cores")
        transport.close()
    finally:
        os.sched_setaffinity(0, cores)
