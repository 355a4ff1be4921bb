"""NIXL between processes: what happens when either side dies, what is refused, and what it costs when idle."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import pytest

from core.clock import ManualClock
from core.errors import ConfigError, TransferError
from tests.poll import until
from tests.transport.memory import Owned
from tests.transport.peer_process import BLOCK_BYTES, NUM_BLOCKS, PeerProcess
from transport.base import Blocks, Region, TransferState
from transport.conformance import check_transport
from transport.conformance_pair import finish
from transport.faulty import Faults, FaultyTransport
from transport.nixl import NixlTransport, make_with, unavailable
from transport.nixl_agent import NixlOptions
from transport.nixl_wire import (
    Busy,
    Hello,
    NixlDescription,
    Opening,
    Stopped,
    ToOwner,
    Welcome,
    decode_description,
    encode,
    encode_description,
)
from transport.schemes import make_transport

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())


def make() -> NixlTransport:
    return NixlTransport("127.0.0.1")


@contextmanager
def joined(num_blocks: int = 8, block_bytes: int = 4096) -> Iterator[tuple[Owned, Owned]]:
    sender, receiver = Owned(make(), block_bytes, num_blocks, fill=3), Owned(make(), block_bytes, num_blocks)
    try:
        yield sender, receiver
    finally:
        for owned in (sender, receiver):
            owned.transport.close()


def memory_of(owned: Owned) -> bytes:
    return ctypes.string_at(owned.region.address, owned.region.stride * owned.region.num_blocks)


def test_it_does_what_every_transport_must() -> None:
    check_transport(make)


def test_it_does_where_ucx_has_only_sockets() -> None:
    check_transport(lambda: NixlTransport("127.0.0.1", NixlOptions(ucx={"TLS": "tcp"})))


def test_it_still_does_when_completion_is_delayed() -> None:
    check_transport(lambda: FaultyTransport(make(), Faults(delay_polls=3, delay_s=0.002)))


def test_another_process_sends_random_blocks_in_parts_and_both_digests_are_equal() -> None:
    owned = Owned(make(), BLOCK_BYTES, NUM_BLOCKS)
    landing = owned.expect("t", range(NUM_BLOCKS))
    with PeerProcess("send", "nixl", owned.transport.describe().hex()) as peer:
        until(lambda: landing.poll() == [b"done"], what="the notice")
        digest = owned.digest(range(NUM_BLOCKS))
        assert digest == peer.says()
    owned.transport.close()


# all: what UCX finds on one host (it copies between processes); tcp: bytes in sockets, which the receiver puts in place
@pytest.mark.parametrize("tls", ["tcp", pytest.param("all", marks=pytest.mark.full)])
def test_a_writer_killed_in_mid_write_is_gone_soon_and_writes_nothing_afterwards(
    tls: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", tls)
    owned = Owned(make(), BLOCK_BYTES, NUM_BLOCKS)
    landing = owned.expect("t", range(NUM_BLOCKS))
    with PeerProcess("storm", "nixl", owned.transport.describe().hex()) as peer:
        assert peer.says() == "storming"
        assert landing.has_writer()
        assert not landing.peer_gone()
        peer.signal(signal.SIGKILL)
        until(landing.peer_gone, 5.0, "the fence of a dead writer")
    ctypes.memset(owned.region.address, 0xAA, BLOCK_BYTES * NUM_BLOCKS)
    threading.Event().wait(0.3)
    assert set(memory_of(owned)) == {0xAA}, "a dead writer's bytes were put in place after its fence"
    assert landing.close() is False
    owned.transport.close()


@pytest.mark.parametrize("tls", ["all", pytest.param("tcp", marks=pytest.mark.full)])
def test_a_closed_landing_stops_a_storm_of_writes_of_another_process(tls: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", tls)
    owned = Owned(make(), BLOCK_BYTES, NUM_BLOCKS)
    landing = owned.expect("t", range(NUM_BLOCKS))
    with PeerProcess("storm", "nixl", owned.transport.describe().hex()) as peer:
        assert peer.says() == "storming"
        assert landing.close() is False
        until(landing.peer_gone, 5.0, "the word of a writer that was told to stop")
        ctypes.memset(owned.region.address, 0xAA, BLOCK_BYTES * NUM_BLOCKS)
        threading.Event().wait(0.3)
        assert set(memory_of(owned)) == {0xAA}, "a writer that had stopped wrote"
    owned.transport.close()


def test_the_fence_of_a_writer_that_hung_up_waits_for_what_it_left_on_the_way() -> None:
    clock = ManualClock()
    sender, receiver = Owned(make(), fill=3), Owned(NixlTransport("127.0.0.1", clock=clock))
    landing = receiver.expect("t", [0])
    endpoint = sender.transport.connect(receiver.transport.describe())
    finish(endpoint.write("t", sender.blocks([0]), receiver.blocks([0])))
    endpoint.close()
    sender.transport.close()
    threading.Event().wait(0.3)
    assert not landing.peer_gone(), "the fence came with the end of the connection"
    clock.advance(1.0)
    until(landing.peer_gone, 2.0, "the fence")
    receiver.transport.close()


@pytest.mark.full
def test_a_stopped_writer_is_not_taken_for_a_dead_one() -> None:
    owned = Owned(make(), BLOCK_BYTES, NUM_BLOCKS)
    landing = owned.expect("t", range(NUM_BLOCKS))
    with PeerProcess("storm", "nixl", owned.transport.describe().hex()) as peer:
        assert peer.says() == "storming"
        peer.signal(signal.SIGSTOP)
        assert landing.close() is False
        threading.Event().wait(0.5)
        assert not landing.peer_gone()
        peer.signal(signal.SIGCONT)
        until(landing.peer_gone, 5.0, "its word, once it runs again")
    owned.transport.close()


def test_a_killed_owner_fails_the_endpoint_and_ends_every_transfer() -> None:
    sender = Owned(make(), BLOCK_BYTES, NUM_BLOCKS, fill=9)
    ids = sender.blocks(range(NUM_BLOCKS))
    with PeerProcess("own", "nixl") as peer:
        endpoint = sender.transport.connect(bytes.fromhex(peer.says()))
        finish(endpoint.write("t", ids, ids, b"first"))
        until(lambda: peer.asks()["notices"] == ["first"], what="the notice")
        assert peer.asks()["first"] == 9
        peer.signal(signal.SIGSTOP)
        running = [endpoint.write("t", ids, ids, b"late") for _ in range(4)]
        peer.signal(signal.SIGKILL)
        until(endpoint.failure, 2.0, "the endpoint fails")
        until(lambda: all(each.poll() is TransferState.FAILED for each in running), 2.0, "transfers end")
        assert endpoint.write("t", ids, ids).poll() is TransferState.FAILED
    endpoint.close()
    sender.transport.close()


def test_a_stopped_owner_holds_up_neither_the_caller_nor_another_peer_and_hears_everything_later() -> None:
    sender, other = Owned(make(), BLOCK_BYTES, NUM_BLOCKS, fill=5), Owned(make(), BLOCK_BYTES, NUM_BLOCKS)
    ids = sender.blocks(range(4))
    with PeerProcess("own", "nixl") as peer:
        stuck = sender.transport.connect(bytes.fromhex(peer.says()))
        finish(stuck.write("t", ids, ids))
        peer.signal(signal.SIGSTOP)
        transfers = [stuck.write("t", ids, ids, f"{i}".encode() + b"n" * 10_000) for i in range(20)]
        other.expect("t", range(4))
        free = sender.transport.connect(other.transport.describe())
        finish(free.write("t", ids, ids, b"."))
        assert transfers[-1].poll() is TransferState.RUNNING
        transfers[-1].cancel()
        peer.signal(signal.SIGCONT)
        finish(*transfers[:-1])
        finish(transfers[-1], state=TransferState.FAILED)
        notices = until(lambda: peer.asks()["notices"], what="all notices")
        assert [notice.strip("n") for notice in notices] == [f"{i}" for i in range(19)]
    for endpoint in (stuck, free):
        endpoint.close()
    for owned in (sender, other):
        owned.transport.close()


@pytest.mark.full
def test_closing_an_endpoint_to_a_stopped_owner_ends_its_transfers_in_time() -> None:
    sender = Owned(make(), BLOCK_BYTES, NUM_BLOCKS, fill=5)
    ids = sender.blocks(range(NUM_BLOCKS))
    with PeerProcess("own", "nixl") as peer:
        endpoint = sender.transport.connect(bytes.fromhex(peer.says()))
        finish(endpoint.write("t", ids, ids))
        peer.signal(signal.SIGSTOP)
        running = [endpoint.write("t", ids, ids) for _ in range(3)]
        endpoint.close()
        until(lambda: all(each.poll() is TransferState.FAILED for each in running), 2.0, "transfers end")
        sender.transport.close()


def test_a_cancelled_write_that_has_ended_does_not_read_our_blocks_any_more() -> None:
    num_bytes = 32 << 20
    with joined(32, 1 << 20) as (sender, receiver):
        receiver.expect("t", range(32))
        endpoint = sender.transport.connect(receiver.transport.describe())
        for turn in range(10):
            ctypes.memset(sender.region.address, 0x11, num_bytes)
            transfers = [endpoint.write("t", sender.blocks(range(32)), receiver.blocks(range(32))) for _ in range(3)]
            threading.Event().wait(turn * 0.001)
            for transfer in transfers:
                transfer.cancel()
            until(lambda: all(t.poll() is not TransferState.RUNNING for t in transfers), 5.0, "they end")  # noqa: B023
            ctypes.memset(sender.region.address, 0xEE, num_bytes)
            threading.Event().wait(0.02)
            assert 0xEE not in memory_of(receiver)
        endpoint.close()


def test_nobody_is_let_into_a_closed_landing() -> None:
    with joined() as (sender, receiver):
        endpoint = sender.transport.connect(receiver.transport.describe())
        landing = receiver.expect("t", [0])
        assert landing.close() is True
        late = endpoint.write("t", sender.blocks([0]), receiver.blocks([0]), b"late")
        finish(late, state=TransferState.FAILED)
        assert "closed" in late.failure()
        again = receiver.expect("t", [1])
        finish(endpoint.write("t", sender.blocks([1]), receiver.blocks([1]), b"in time"))
        assert again.poll() == [b"in time"]
        assert [receiver.block(i)[0] for i in (0, 1)] == [0, 3]
        endpoint.close()
        until(again.peer_gone, 5.0, "a closed endpoint is a fence")


def test_a_write_waits_for_its_landing_but_not_for_ever() -> None:
    with joined() as (sender, receiver):
        endpoint = sender.transport.connect(receiver.transport.describe())
        early = endpoint.write("early", sender.blocks([0]), receiver.blocks([0]), b"word")
        never = endpoint.write("never", sender.blocks([1]), receiver.blocks([1]), b"word")
        landing = receiver.expect("early", [0])
        finish(early)
        assert landing.poll() == [b"word"]
        finish(never, state=TransferState.FAILED)
        assert receiver.block(1)[0] == 0
        endpoint.close()


def test_descriptions_that_do_not_fit_are_refused_with_both_values() -> None:
    with joined() as (sender, receiver):
        true = decode_description(receiver.transport.describe(), "")
        refused: list[tuple[bytes, list[str]]] = [
            (encode_description(true, "", version=9), ["version 9", "ours 1"]),
            (changed(true, library="0.1.0"), ["0.1.0", true.library]),
            (changed(true, backend="LIBFABRIC"), ["LIBFABRIC", "UCX"]),
            (encode_description(true, "another secret"), ["secret"]),
            (changed(true, address="tcp://*:1"), ["tcp://*:1"]),
            (changed(true, regions=[true.regions[0], true.regions[0]]), ["twice"]),
            (changed(true, regions=[msgspec.structs.replace(true.regions[0], stride=1)]), ["blocks"]),
            (changed(true, regions=[msgspec.structs.replace(true.regions[0], num_blocks=1 << 31, stride=1 << 40)]), []),
            (b"baton-nixl" * 200_000, ["larger"]),
        ]
        for wire, words in refused:
            with pytest.raises(TransferError) as caught:
                sender.transport.connect(wire)
            assert all(word in str(caught.value) for word in words), caught.value


def test_blocks_of_another_models_shape_are_refused_before_a_byte_moves() -> None:
    sender, receiver = Owned(make(), 4096, 8, fill=3), Owned(make(), 8192, 4)
    endpoint = sender.transport.connect(receiver.transport.describe())
    receiver.expect("t", [0])
    with pytest.raises(TransferError, match=r"4096 local and 8192 remote"):
        endpoint.write("t", sender.blocks([0]), receiver.blocks([0]))
    assert set(memory_of(receiver)) == {0}
    for owned in (sender, receiver):
        owned.transport.close()


def test_a_peer_that_was_restarted_or_lies_about_its_agent_is_never_loaded() -> None:
    with joined() as (sender, receiver):
        true = decode_description(receiver.transport.describe(), "")
        former = Owned(make())
        before = decode_description(former.transport.describe(), "")
        former.transport.close()
        for wire in (
            encode_description(msgspec.structs.replace(before, address=true.address), ""),
            changed(true, metadata_digest=bytes(32)),
            encode_description(before, ""),
        ):
            endpoint = sender.transport.connect(wire)
            waiting = endpoint.write("t", sender.blocks([0]), receiver.blocks([0]))
            until(endpoint.failure, 2.0, "an endpoint that cannot be is failed")
            until(lambda: waiting.poll() is TransferState.FAILED, 2.0, "its transfer fails")  # noqa: B023
            endpoint.close()
        receiver.expect("t", [0])
        endpoint = sender.transport.connect(receiver.transport.describe())
        finish(endpoint.write("t", sender.blocks([0]), receiver.blocks([0])))
        endpoint.close()


def test_an_impostor_cannot_have_another_agent_loaded_or_exhaust_us() -> None:
    with joined() as (sender, receiver), socket.create_server(("127.0.0.1", 0)) as impostor:
        impostor.settimeout(5)
        true = decode_description(receiver.transport.describe(), "")
        wire = changed(true, address=f"tcp://127.0.0.1:{impostor.getsockname()[1]}")
        answers = (
            (encode(Welcome(b"nixlSerDes|Agent" + bytes(400))), "not the one that was described"),
            (encode(Welcome(b"")), "not the one that was described"),
            (b"\xff" * 64, "larger than"),
            (b"\x02\0\0\0\x90\xc1", "protocol"),
            (b"", "hung up on our greeting"),
        )
        for answer, word in answers:
            endpoint = sender.transport.connect(wire)
            connection, _ = impostor.accept()
            with connection:
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                until(endpoint.failure, 2.0, "the endpoint fails")
            assert word in endpoint.failure()
            endpoint.close()


def test_who_accepts_and_says_nothing_and_who_connects_and_says_nothing_are_given_up() -> None:
    clock = ManualClock()
    owned = Owned(NixlTransport("127.0.0.1", clock=clock))
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        impostor.settimeout(5)
        true = decode_description(owned.transport.describe(), "")
        host, port = true.address.removeprefix("tcp://").split(":")
        endpoint = owned.transport.connect(changed(true, address=f"tcp://127.0.0.1:{impostor.getsockname()[1]}"))
        waiting = endpoint.write("t", owned.blocks([0]), owned.blocks([0]))
        with impostor.accept()[0], socket.create_connection((host, int(port))) as mute:
            mute.settimeout(5)
            threading.Event().wait(0.2)
            assert not endpoint.failure()
            clock.advance(11.0)
            until(endpoint.failure, 5.0, "the endpoint fails")
            assert "did not answer within 10 s" in endpoint.failure()
            until(lambda: waiting.poll() is TransferState.FAILED, 5.0, "its transfer fails")
            assert hears_the_end(mute)
    owned.transport.close()


def test_a_writer_that_knows_the_secret_and_talks_nonsense_harms_nobody() -> None:
    dice = random.Random(17)
    with joined() as (sender, receiver):
        landing = receiver.expect("t", [0])
        true = decode_description(receiver.transport.describe(), "")
        host, port = true.address.removeprefix("tcp://").split(":")
        words: list[ToOwner] = [Opening("t"), Opening("u"), Busy(True), Busy(False), Stopped("t"), Stopped("v")]
        for turn in range(40):
            with socket.create_connection((host, int(port))) as stranger:
                stranger.settimeout(5)
                stranger.sendall(encode(Hello(true.token, f"stranger {turn}", true.metadata_digest)))
                for _ in range(20):
                    frame = bytearray(encode(dice.choice(words)))
                    if not dice.randrange(3):
                        frame[dice.randrange(4, len(frame))] ^= 1 << dice.randrange(8)
                    with suppress(OSError):  # it has hung up on us
                        stranger.sendall(frame)
        endpoint = sender.transport.connect(receiver.transport.describe())
        finish(endpoint.write("t", sender.blocks([0]), receiver.blocks([0]), b"."))
        assert landing.poll() == [b"."]
        endpoint.close()
        until(landing.peer_gone, 5.0, "every writer has ended")


def test_garbage_on_the_owners_socket_is_counted_and_the_thread_lives_on() -> None:
    with joined() as (sender, receiver):
        host, port = decode_description(receiver.transport.describe(), "").address.removeprefix("tcp://").split(":")
        for garbage in (b"\xff" * 4096, b"\x03\0\0\0\x91\x91\x91", b"\x0a\0\0\0" + b"\x91" * 10, os.urandom(5000)):
            with socket.create_connection((host, int(port))) as stranger:
                stranger.settimeout(5)
                stranger.sendall(garbage)
                assert hears_the_end(stranger)
        assert isinstance(receiver.transport, NixlTransport)
        assert receiver.transport.malformed >= 2
        landing = receiver.expect("t", [0])
        endpoint = sender.transport.connect(receiver.transport.describe())
        finish(endpoint.write("t", sender.blocks([0]), receiver.blocks([0]), b"."))
        assert landing.poll() == [b"."]
        endpoint.close()


def test_who_keeps_a_finished_transfer_does_not_keep_the_agent() -> None:
    with joined() as pair:
        descriptions = [owned.transport.describe() for owned in pair]
    assert descriptions[0] != descriptions[1]
    before = num_open()
    sender, receiver = Owned(make(), fill=3), Owned(make())
    receiver.expect("t", [0])
    endpoint = sender.transport.connect(receiver.transport.describe())
    kept = [endpoint.write("t", sender.blocks([0]), receiver.blocks([0])) for _ in range(3)]
    finish(*kept)
    for owned in (sender, receiver):
        owned.transport.close()
    until(lambda: num_open() <= before, 5.0, "both agents are gone")
    assert all(transfer.poll() is TransferState.DONE for transfer in kept)


def test_fifty_connections_come_and_go_without_a_trace() -> None:
    with joined() as (sender, receiver):
        description = receiver.transport.describe()
        receiver.expect("t", [0])

        def use_once() -> None:
            endpoint = sender.transport.connect(description)
            finish(endpoint.write("t", sender.blocks([0]), receiver.blocks([0]), b"."))
            endpoint.close()

        use_once()
        until(lambda: is_steady(num_open), what="a steady state")
        before = num_open()
        for _ in range(50):
            use_once()
        until(lambda: num_open() <= before, what=f"descriptors, threads and mappings go back to {before}")


def test_an_idle_transport_uses_no_processor_and_runs_beside_the_engine() -> None:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        with joined() as (sender, receiver):
            receiver.expect("t", [0])
            endpoint = sender.transport.connect(receiver.transport.describe())
            finish(endpoint.write("t", sender.blocks([0]), receiver.blocks([0])))
            threads = [each for each in threading.enumerate() if each.name == "baton-nixl"]
            assert len(threads) == 2
            assert all(os.sched_getaffinity(thread.native_id or 0) >= cores for thread in threads)
            begun_s, used_s = time.monotonic(), time.process_time()
            threading.Event().wait(1.0)
            share = (time.process_time() - used_s) / (time.monotonic() - begun_s)
            assert share < 0.1, f"idle, and {share:.0%} of a core is used"
            endpoint.close()
    finally:
        os.sched_setaffinity(0, cores)


def test_options_reach_nixl_and_unknown_ones_are_refused() -> None:
    for options, words in (
        ({"bakend": "UCX"}, "bakend"),
        ({"backend": "NOPE"}, "NOPE"),
        ({"parameters": {"ucx_error_handling_mode": "wrong"}}, "ucx_error_handling_mode"),
        ({"ucx": {"TLS": "tcp,self"}}, "UCX_TLS=tcp,self in the environment"),
    ):
        with pytest.raises(ConfigError, match=words):
            make_with("127.0.0.1", options).describe()
    with pytest.raises(ConfigError, match="no options"):
        make_transport("zmq", "127.0.0.1", options={"zmq": {}})
    secret = {"nixl": {"secret": "s", "ucx": {"TLS": "tcp"}, "parameters": {"ucx_error_handling_mode": "none"}}}
    sender, receiver = (Owned(make_transport("nixl", "127.0.0.1", options=secret), fill=i) for i in (1, 0))
    receiver.expect("t", [0])
    endpoint = sender.transport.connect(receiver.transport.describe())
    finish(endpoint.write("t", sender.blocks([0]), receiver.blocks([0])))
    assert receiver.block(0)[0] == 1
    for owned in (sender, receiver):
        owned.transport.close()


def test_ucx_listens_on_the_chosen_interface_only() -> None:
    before = set(listening())
    owned = Owned(make())
    owned.transport.describe()
    assert {address for address in listening() if address not in before} <= {"127.0.0.1"}
    owned.transport.close()
    assert NixlOptions(ucx={"NET_DEVICES": "mlx5_0:1"}).of_backend("127.0.0.1") == {
        "engine_config": "NET_DEVICES=mlx5_0:1"
    }
    assert NixlOptions().of_backend("192.0.2.1") == {}


def test_a_missing_library_is_a_reason_and_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install" in unavailable()
    with pytest.raises(ConfigError, match="not installed"):
        make_transport("nixl", "127.0.0.1")


def test_memory_that_nixl_cannot_take_is_a_transfer_error() -> None:
    owned = Owned(make())
    owned.transport.describe()
    with pytest.raises(TransferError, match="register"):
        owned.transport.register(Region(0, owned.region.address, 16, 16, 1))
    owned.transport.register(Region(1, owned.region.address, 16, 16, 1))
    with pytest.raises(TransferError):
        owned.transport.expect("t", [Blocks(2, (0,))])
    owned.transport.close()
    for call in (owned.transport.describe, lambda: owned.transport.connect(b"")):
        with pytest.raises(TransferError):
            call()


def changed(description: NixlDescription, **fields: object) -> bytes:
    return encode_description(msgspec.structs.replace(description, **fields), "")


def hears_the_end(stranger: socket.socket) -> bool:
    try:
        return stranger.recv(1) == b""
    except ConnectionResetError:
        return True


def num_open() -> tuple[int, int, int]:
    """Descriptors, threads, and mappings of ours that NIXL could have registered or UCX made."""
    mappings = sum("/memfd" in line or "SYSV" in line or "ucx" in line for line in maps())
    return len(os.listdir("/proc/self/fd")), threading.active_count(), mappings


def maps() -> list[str]:
    return Path("/proc/self/maps").read_text().splitlines()


def is_steady(count: Callable[[], tuple[int, int, int]]) -> bool:
    first = count()
    threading.Event().wait(0.3)
    return first == count()


def listening() -> list[str]:
    """IPv4 addresses on which this process listens."""
    own = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if is_link(fd)}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    hexes = [row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own]
    return [socket.inet_ntoa(bytes.fromhex(each)[::-1]) for each in hexes]


def is_link(fd: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{fd}")
