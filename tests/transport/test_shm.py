"""Shared memory between processes: what happens when either side dies, and what is refused."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import threading
from pathlib import Path

import msgspec
import pytest

from core.errors import TransferError
from tests.poll import until
from tests.transport.memory import Owned
from tests.transport.peer_process import NUM_BLOCKS, PeerProcess
from transport.base import Blocks, Region, TransferState
from transport.conformance import check_transport
from transport.conformance_pair import finish
from transport.faulty import Faults, FaultyTransport
from transport.mapping import make_memfd
from transport.shm import ShmTransport
from transport.shm_wire import decode_description, encode_description


def test_it_does_what_every_transport_must() -> None:
    check_transport(ShmTransport)


def test_it_still_does_when_completion_is_delayed() -> None:
    check_transport(lambda: FaultyTransport(ShmTransport(), Faults(delay_polls=3, delay_s=0.002)))


def test_another_process_writes_and_its_death_is_seen_at_once() -> None:
    owned = Owned(ShmTransport(), 1 << 19, NUM_BLOCKS)
    landing = owned.expect("t", range(NUM_BLOCKS))
    description = owned.transport.describe().hex()
    with PeerProcess("write", "shm", description) as peer:
        assert peer.says() == "done"
        until(lambda: landing.poll() == [b"done"], what="the notice")
        assert all(owned.block(i) == bytes([7]) * (1 << 19) for i in range(NUM_BLOCKS))
        assert not landing.peer_gone()
        assert landing.close() is False
        assert not landing.peer_gone()
        peer.signal(signal.SIGKILL)
        until(landing.peer_gone, 1.0, "the fence of a dead writer")
    owned.transport.close()


def test_a_killed_owner_fails_the_endpoint_and_leaves_nothing_behind() -> None:
    before = set(os.listdir("/dev/shm"))
    sender = Owned(ShmTransport(), 1 << 19, NUM_BLOCKS, fill=9)
    with PeerProcess("own", "shm") as peer:
        endpoint = sender.transport.connect(bytes.fromhex(peer.says()))
        finish(endpoint.write("t", sender.blocks([0]), sender.blocks([0]), b"first"))
        until(lambda: peer.asks()["notices"] == ["first"], what="the notice")
        assert peer.asks()["first"] == 9
        peer.signal(signal.SIGKILL)
        until(endpoint.failure, 1.0, "the endpoint fails")
        late = endpoint.write("t", sender.blocks([0]), sender.blocks([0]))
        assert late.poll() is TransferState.FAILED
    assert set(os.listdir("/dev/shm")) <= before
    endpoint.close()
    sender.transport.close()


def test_a_dead_owners_memory_is_let_go_at_once_although_nobody_asks() -> None:
    """Its successor may need it: an engine that restarts has a KV cache as large as the one before."""
    sender = Owned(ShmTransport(), 1 << 19, NUM_BLOCKS, fill=9)
    sender.transport.describe()
    before = _num_mappings()
    with PeerProcess("own", "shm") as peer:
        endpoint = sender.transport.connect(bytes.fromhex(peer.says()))
        finish(endpoint.write("t", sender.blocks([0]), sender.blocks([0]), b"first"))
        assert _num_mappings() == before + 1
        peer.signal(signal.SIGKILL)
        until(lambda: _num_mappings() == before, 1.0, "the mapping is gone")
    assert endpoint.failure() == "the peer hung up"
    endpoint.close()
    sender.transport.close()


def test_a_stopped_owner_blocks_no_write_and_hears_everything_later() -> None:
    sender = Owned(ShmTransport(), 1 << 19, NUM_BLOCKS, fill=5)
    with PeerProcess("own", "shm") as peer:
        endpoint = sender.transport.connect(bytes.fromhex(peer.says()))
        finish(endpoint.write("t", sender.blocks([0]), sender.blocks([0])))
        peer.signal(signal.SIGSTOP)
        notice = b"n" * 10_000
        transfers = [endpoint.write("t", sender.blocks([1]), sender.blocks([1]), notice) for _ in range(100)]
        assert transfers[-1].poll() is TransferState.RUNNING
        transfers[-1].cancel()
        assert transfers[-1].poll() is TransferState.FAILED
        peer.signal(signal.SIGCONT)
        finish(*transfers[:-1])
        until(lambda: len(peer.asks()["notices"]) == 99, what="all notices")
    endpoint.close()
    sender.transport.close()


def test_writes_before_the_memory_is_mapped_are_carried_out_in_order() -> None:
    sender, receiver = Owned(ShmTransport(), 1 << 20, 8, fill=3), Owned(ShmTransport(), 1 << 20, 8)
    landing = receiver.expect("t", range(8))
    endpoint = sender.transport.connect(receiver.transport.describe())
    transfers = [endpoint.write("t", sender.blocks([i]), receiver.blocks([i]), bytes([i])) for i in range(8)]
    finish(*transfers)
    seen: list[bytes] = []

    def has_all() -> bool:
        seen.extend(landing.poll())
        return len(seen) == 8

    until(has_all, what="notices")
    assert seen == [bytes([i]) for i in range(8)]
    assert all(receiver.block(i)[-1] == 3 for i in range(8))
    endpoint.close()
    until(landing.peer_gone, 1.0, "a closed endpoint is a fence")
    for owned in (sender, receiver):
        owned.transport.close()


def test_whoever_writes_is_known_at_once_however_many_tags_he_announces() -> None:
    """More than his side socket takes; the owner's thread need not have run. What was announced is remembered, bounded,
    for landings that are opened later."""
    sender, receiver = Owned(ShmTransport(), fill=1), Owned(ShmTransport())
    endpoint = sender.transport.connect(receiver.transport.describe())
    finish(endpoint.write("hello", sender.blocks([0]), receiver.blocks([0]), b"."))
    expected = [receiver.expect(f"t{number}", [0]) for number in range(400)]
    assert not any(landing.has_writer() for landing in expected)
    for number, landing in enumerate(expected):
        endpoint.write(f"t{number}", sender.blocks([0]), receiver.blocks([0]))
        if number % 100 == 99:
            assert landing.has_writer()
            assert not landing.peer_gone()
    endpoint.write("early", sender.blocks([0]), receiver.blocks([0]))
    finish(*[endpoint.write(f"not yet {at}", sender.blocks([0]), receiver.blocks([0])) for at in range(500)])
    assert all(landing.has_writer() for landing in (*expected, receiver.expect("early", [0])))
    endpoint.close()
    until(lambda: all(landing.peer_gone() for landing in expected), what="his end is known too")
    for owned in (sender, receiver):
        owned.transport.close()


def test_a_writer_whose_announcement_was_not_heard_yet_counts_beside_one_that_is_gone() -> None:
    receiver = Owned(ShmTransport())
    landing = receiver.expect("t", [0])
    first, second = Owned(ShmTransport(), fill=1), Owned(ShmTransport(), fill=2)
    endpoints = [each.transport.connect(receiver.transport.describe()) for each in (first, second)]
    for endpoint, each in zip(endpoints, (first, second), strict=True):
        finish(endpoint.write("hello", each.blocks([0]), receiver.blocks([0])))
    finish(endpoints[0].write("t", first.blocks([0]), receiver.blocks([0])))
    finish(endpoints[1].write("t", second.blocks([0]), receiver.blocks([0])))
    endpoints[0].close()
    until(lambda: len(receiver.transport._box.writers) == 1, what="the first is gone")  # type: ignore[attr-defined]
    assert not landing.peer_gone()
    endpoints[1].close()
    until(landing.peer_gone, what="the second is gone, too")
    for owned in (first, second, receiver):
        owned.transport.close()


def test_a_notice_waits_for_its_landing() -> None:
    sender, receiver = Owned(ShmTransport(), fill=3), Owned(ShmTransport())
    endpoint = sender.transport.connect(receiver.transport.describe())
    finish(endpoint.write("early", sender.blocks([0]), receiver.blocks([0]), b"word"))
    landing = receiver.expect("early", [0])
    until(lambda: landing.poll() == [b"word"], what="the early notice")
    endpoint.close()
    until(landing.peer_gone, 1.0, "the writer known from before the landing")
    for owned in (sender, receiver):
        owned.transport.close()


def test_descriptions_that_lie_are_refused() -> None:
    sender, receiver = Owned(ShmTransport()), Owned(ShmTransport())
    true = decode_description(receiver.transport.describe())
    region = true.regions[0]
    lies = [
        msgspec.structs.replace(true, host_id="elsewhere"),
        msgspec.structs.replace(true, uid=true.uid + 1),
        msgspec.structs.replace(true, memories=[4096]),
        msgspec.structs.replace(true, regions=[region, region]),
        msgspec.structs.replace(true, regions=[msgspec.structs.replace(region, num_blocks=1 << 40)]),
        msgspec.structs.replace(true, regions=[msgspec.structs.replace(region, stride=1)]),
        msgspec.structs.replace(true, regions=[msgspec.structs.replace(region, offset=-4096)]),
        msgspec.structs.replace(true, regions=[msgspec.structs.replace(region, memory=1)]),
    ]
    for lie in lies:
        with pytest.raises(TransferError):
            sender.transport.connect(encode_description(lie))
    larger = sender.transport.connect(encode_description(msgspec.structs.replace(true, memories=[1 << 30])))
    nobody = sender.transport.connect(encode_description(msgspec.structs.replace(true, socket="nobody")))
    waiting = nobody.write("t", sender.blocks([0]), receiver.blocks([0]))
    for endpoint in (larger, nobody):
        until(endpoint.failure, 2.0, "an endpoint that cannot be is failed")
        endpoint.close()
    assert waiting.poll() is TransferState.FAILED
    for owned in (sender, receiver):
        owned.transport.close()


def test_a_region_outside_the_shared_memory_is_a_source_but_is_not_described() -> None:
    sender, receiver = Owned(ShmTransport(), fill=1), Owned(ShmTransport())
    own = bytearray(b"\x08" * 4096)
    anchor = ctypes.c_char.from_buffer(own)
    sender.transport.register(Region(5, ctypes.addressof(anchor), 4096, 4096, 1))
    assert [region.id for region in decode_description(sender.transport.describe()).regions] == [0]
    endpoint = sender.transport.connect(receiver.transport.describe())
    finish(endpoint.write("t", Blocks(5, (0,)), receiver.blocks([2])))
    assert receiver.block(2)[0] == 8
    endpoint.close()
    for owned in (sender, receiver):
        owned.transport.close()


def test_malformed_packets_are_counted_and_the_thread_lives_on() -> None:
    sender, receiver = Owned(ShmTransport(), fill=1), Owned(ShmTransport())
    name = decode_description(receiver.transport.describe()).socket
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect(b"\0" + name.encode())
        for packet in (b"?", b"\x92\xa7Opening", b"x" * 60_000, b"\x91" * 10_000):
            stranger.send(packet)
        stranger.shutdown(socket.SHUT_WR)
        assert isinstance(receiver.transport, ShmTransport)
        until(lambda: receiver.transport.malformed >= 4, what="malformed packets are counted")  # type: ignore[attr-defined]
    landing = receiver.expect("t", [0])
    endpoint = sender.transport.connect(receiver.transport.describe())
    finish(endpoint.write("t", sender.blocks([0]), receiver.blocks([0]), b"."))
    until(lambda: landing.poll() == [b"."], what="a proper notice")
    endpoint.close()
    for owned in (sender, receiver):
        owned.transport.close()


def test_a_thousand_connections_come_and_go_without_a_trace() -> None:
    sender, receiver = Owned(ShmTransport(), fill=1), Owned(ShmTransport())
    sender.transport.describe()
    description = receiver.transport.describe()

    def use_once() -> None:
        endpoint = sender.transport.connect(description)
        finish(endpoint.write("t", sender.blocks([0]), receiver.blocks([0])))
        endpoint.close()

    use_once()  # what a transport has once is there from here on: its helpers
    before = (len(os.listdir("/proc/self/fd")), threading.active_count(), _num_mappings())
    for _ in range(1000):
        use_once()
    until(
        lambda: (len(os.listdir("/proc/self/fd")), threading.active_count(), _num_mappings()) <= before,
        what="descriptors, threads and mappings go back",
    )
    for owned in (sender, receiver):
        owned.transport.close()


def test_memory_that_cannot_be_had_is_a_transfer_error() -> None:
    with pytest.raises(TransferError):
        make_memfd(1 << 70)
    transport = ShmTransport()
    with pytest.raises(TransferError):
        transport.allocate(0)
    transport.close()
    with pytest.raises(TransferError):
        transport.describe()


def _num_mappings() -> int:
    return Path("/proc/self/maps").read_text().count("baton-kv")
