"""TCP: acknowledged writes, the credit window, peers that stop, die or come too early."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from core.clock import ManualClock, SystemClock
from core.errors import ConfigError, TransferError
from tests.poll import until
from tests.transport.memory import Owned
from tests.transport.peer_process import BLOCK_BYTES, NUM_BLOCKS, PeerProcess
from transport.base import TransferState
from transport.conformance import check_transport
from transport.conformance_pair import finish
from transport.faulty import Faults, FaultyTransport
from transport.zmq_tcp import ZmqTransport
from transport.zmq_wire import ZmqDescription, decode_description, encode


def make() -> ZmqTransport:
    return ZmqTransport("127.0.0.1")


class HastyClock(SystemClock):
    """Eight times as fast: the two seconds for which early frames are kept pass sooner."""

    def monotonic_s(self) -> float:
        return super().monotonic_s() * 8


def make_hasty() -> ZmqTransport:
    return ZmqTransport("127.0.0.1", HastyClock())


def test_it_does_what_every_transport_must() -> None:
    check_transport(make_hasty)


def test_it_still_does_when_completion_is_delayed() -> None:
    check_transport(lambda: FaultyTransport(make_hasty(), Faults(delay_polls=3, delay_s=0.002)))


def test_a_stopped_peer_bounds_its_memory_and_holds_up_nobody_else() -> None:
    sender, other = Owned(make(), BLOCK_BYTES, NUM_BLOCKS, fill=4), Owned(make(), BLOCK_BYTES, NUM_BLOCKS)
    ids = range(NUM_BLOCKS)
    with PeerProcess("own", "zmq") as peer:
        stuck = sender.transport.connect(bytes.fromhex(peer.says()))
        finish(stuck.write("t", sender.blocks(ids), sender.blocks(ids)))
        peer.signal(signal.SIGSTOP)
        before = _resident_bytes()
        transfers = [stuck.write("t", sender.blocks(ids), sender.blocks(ids), b".") for _ in range(20)]
        other.expect("t", ids)
        free = sender.transport.connect(other.transport.describe())
        finish(*[free.write("t", sender.blocks(ids), other.blocks(ids)) for _ in range(3)])
        assert transfers[-1].poll() is TransferState.RUNNING
        assert _resident_bytes() - before < 40 << 20, "160 MiB wait, of which at most a window may be in memory"
        transfers[-1].cancel()
        until(lambda: transfers[-1].poll() is TransferState.FAILED, 1.0, "a waiting transfer is cancelled at once")
        peer.signal(signal.SIGCONT)
        finish(*transfers[:-1])
        assert peer.asks()["written"] == NUM_BLOCKS
    for endpoint in (stuck, free):
        endpoint.close()
    for owned in (sender, other):
        owned.transport.close()


def test_a_cancelled_transfer_runs_until_nothing_of_it_can_land_any_more() -> None:
    sender = Owned(make(), BLOCK_BYTES, NUM_BLOCKS, fill=4)
    with PeerProcess("own", "zmq") as peer:
        endpoint = sender.transport.connect(bytes.fromhex(peer.says()))
        finish(endpoint.write("t", sender.blocks([0]), sender.blocks([0])))
        peer.signal(signal.SIGSTOP)
        transfer = endpoint.write("t", sender.blocks(range(16)), sender.blocks(range(16)))
        probe = endpoint.write("t", sender.blocks([0]), sender.blocks([0]))
        until(lambda: _is_under_way(endpoint), what="frames are under way")
        transfer.cancel()
        probe.cancel()
        assert transfer.poll() is TransferState.RUNNING
        peer.signal(signal.SIGCONT)
        until(lambda: transfer.poll() is TransferState.FAILED, what="the frames under way are answered")
    endpoint.close()
    sender.transport.close()


def test_a_killed_receiver_fails_the_endpoint_for_good() -> None:
    sender = Owned(make(), BLOCK_BYTES, NUM_BLOCKS, fill=4)
    with PeerProcess("own", "zmq") as peer:
        endpoint = sender.transport.connect(bytes.fromhex(peer.says()))
        finish(endpoint.write("t", sender.blocks([0]), sender.blocks([0])))
        peer.signal(signal.SIGSTOP)
        running = endpoint.write("t", sender.blocks(range(16)), sender.blocks(range(16)))
        peer.signal(signal.SIGKILL)
        until(endpoint.failure, 1.0, "the endpoint fails")
        assert running.poll() is TransferState.FAILED
        assert endpoint.write("t", sender.blocks([0]), sender.blocks([0])).poll() is TransferState.FAILED
    endpoint.close()
    sender.transport.close()


def test_writes_that_come_before_they_are_expected_are_kept_for_a_while_in_order() -> None:
    clock = ManualClock()
    sender, receiver = Owned(make(), fill=6), Owned(ZmqTransport("127.0.0.1", clock))
    endpoint = sender.transport.connect(receiver.transport.describe())
    first = endpoint.write("t", sender.blocks([0, 1]), receiver.blocks([0, 1]))
    second = endpoint.write("t", sender.blocks([2]), receiver.blocks([2]), b"end")
    until(lambda: _num_parked(receiver) == 3, what="frames are parked")
    clock.advance(3)
    finish(first, second, state=TransferState.FAILED)
    again = endpoint.write("t", sender.blocks([0, 1, 2]), receiver.blocks([0, 1, 2]), b"end")
    until(lambda: _num_parked(receiver) == 2, what="frames are parked")
    landing = receiver.expect("t", [0, 1, 2])
    finish(again)
    assert landing.poll() == [b"end"]
    assert landing.num_written() == 3
    assert landing.digest() == sender.digest([0, 1, 2])
    endpoint.close()
    for owned in (sender, receiver):
        owned.transport.close()


def test_connecting_has_a_deadline() -> None:
    clock = ManualClock()
    sender = Owned(ZmqTransport("127.0.0.1", clock), BLOCK_BYTES, NUM_BLOCKS, fill=6)
    with PeerProcess("own", "zmq") as peer:
        description = bytes.fromhex(peer.says())
        peer.signal(signal.SIGSTOP)
        endpoint = sender.transport.connect(description)
        transfer = endpoint.write("t", sender.blocks([0]), sender.blocks([0]))
        clock.advance(9)
        assert endpoint.failure() == ""
        clock.advance(2)
        until(endpoint.failure, 10.0, "the deadline passes")
        assert transfer.poll() is TransferState.FAILED
    endpoint.close()
    sender.transport.close()


def test_a_description_of_nobody_fails_soon() -> None:
    sender, receiver = Owned(make()), Owned(make())
    description = receiver.transport.describe()
    receiver.transport.close()
    endpoint = sender.transport.connect(description)
    until(endpoint.failure, 10.0, "connecting is refused")
    endpoint.close()
    sender.transport.close()


def test_a_stranger_without_the_token_is_not_listened_to() -> None:
    sender, receiver = Owned(make(), fill=6), Owned(make())
    true = decode_description(receiver.transport.describe())
    receiver.expect("t", [0])
    endpoint = sender.transport.connect(encode(ZmqDescription(true.address, "guess", true.regions)))
    transfer = endpoint.write("t", sender.blocks([0]), receiver.blocks([0]))
    until(lambda: receiver.transport.malformed == 1, what="the wrong token is counted")  # type: ignore[attr-defined]
    assert transfer.poll() is TransferState.RUNNING
    endpoint.close()
    assert transfer.poll() is TransferState.FAILED
    assert receiver.block(0)[0] == 0
    for owned in (sender, receiver):
        owned.transport.close()


@pytest.mark.parametrize(
    "address",
    [
        "ipc:///tmp/x",
        "tcp://*:5",
        "tcp://a:0",
        "tcp://a:70000",
        "tcp://h;tcp://g:5",
        "inproc://x",
        "tcp://a:5/",
        "tcp://:5",
    ],
)
def test_addresses_of_another_form_are_refused(address: str) -> None:
    transport = make()
    with pytest.raises(TransferError):
        transport.connect(encode(ZmqDescription(address, "token", [])))
    transport.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "", "no-such-host.invalid", "203.0.113.7"])
def test_a_host_that_peers_cannot_reach_is_a_config_error(host: str) -> None:
    with pytest.raises(ConfigError):
        ZmqTransport(host)


def test_a_thousand_connections_come_and_go_without_a_trace() -> None:
    sender, receiver = Owned(make(), fill=1), Owned(make())
    description = receiver.transport.describe()
    receiver.expect("t", [0])
    for _ in range(2):
        _use(sender, receiver, description)
    before = len(os.listdir("/proc/self/fd")) + threading.active_count()
    for _ in range(1000):
        _use(sender, receiver, description)
    until(lambda: len(os.listdir("/proc/self/fd")) + threading.active_count() <= before, what="nothing stays")
    for owned in (sender, receiver):
        owned.transport.close()


def _use(sender: Owned, receiver: Owned, description: bytes) -> None:
    endpoint = sender.transport.connect(description)
    finish(endpoint.write("t", sender.blocks([0]), receiver.blocks([0])))
    endpoint.close()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def _is_under_way(endpoint: object) -> bool:
    return bool(endpoint._link._window.frames)  # type: ignore[attr-defined]


def _num_parked(owned: Owned) -> int:
    parking = owned.transport._io._receiver._parking  # type: ignore[attr-defined]
    return int(parking._num_frames)
