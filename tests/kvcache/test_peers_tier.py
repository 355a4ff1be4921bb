"""The peers' tier against one or two holders in this process: contract, faults, and what is held afterwards."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import TransferError
from kvcache import peer_blocks, peer_server
from kvcache import peer_words as words
from kvcache.conformance import BLOCK_BYTES, block_of, check_source, key_of, read
from kvcache.faulty_tier import FaultyTier, TierFaults
from kvcache.keys import BlockKey
from kvcache.peer_streams import PeerStreams
from kvcache.peers import FETCH_TIMEOUT_S, PeersTier
from kvcache.tier import Tier, TierError
from tests.kvcache.holder import Holder, holding
from tests.kvcache.proxy import Proxy
from tests.poll import until
from tests.transport.zmtp import DEALER, ROUTER, old_greeting, part

ARENA_BYTES = 64 * 45_056
SLACK_S = 1.0

MakeTier = Callable[..., PeersTier]


@pytest.fixture
def holder() -> Iterator[Holder]:
    with holding(ARENA_BYTES) as made:
        yield made


@pytest.fixture
def make_tier() -> Iterator[MakeTier]:
    """`make_tier(holder, ...)`: connected to each, and told what each has."""
    with ExitStack() as stack:

        def make(*holders: Holder) -> PeersTier:
            tier = PeersTier([each.peer for each in holders])
            stack.callback(tier.close)
            num_known = sum(len(each.index.complete) for each in holders)
            until(lambda: connected(tier) == len(holders), what="the connections")
            until(lambda: tier.figures().blocks == num_known, what="the directory")
            return tier

        yield make


def connected(tier: PeersTier) -> int:
    return int(tier.figures().more["connected"])


def keep(holder: Holder, *numbers: int) -> dict[int, bytes]:
    blocks = {number: block_of(number) for number in numbers}
    for number, block in blocks.items():
        holder.keep(key_of(number), number, block)
    return blocks


# What every source does


def check(holder: Holder, make: Callable[[], Tier]) -> None:
    def fill(key: BlockKey, digest: int, block: bytes) -> None:
        holder.keep(key, digest, block)
        until(lambda: all(tier.contains([key]) for tier in made), what="the directory")

    made: list[Tier] = []

    def remembered() -> Tier:
        made.append(make())
        return made[-1]

    check_source(remembered, fill)


def test_it_is_a_source(holder: Holder, make_tier: MakeTier) -> None:
    check(holder, lambda: make_tier(holder))


def test_it_still_is_when_every_call_is_late(holder: Holder, make_tier: MakeTier) -> None:
    check(holder, lambda: FaultyTier(make_tier(holder), TierFaults(delay_s=0.005)))


def test_blocks_from_one_byte_to_more_than_a_frame_arrive_whole(make_tier: MakeTier) -> None:
    with holding(16 << 20) as holder:
        blocks = {number: os.urandom(size) for number, size in enumerate((1, 4095, 4097, 1 << 20, (3 << 20) + 17))}
        for number, block in blocks.items():
            holder.keep(key_of(number), number, block)
        tier = make_tier(holder)
        for number, block in blocks.items():
            assert read(tier, number, len(block)) == (number, block)
        until(lambda: holder.figures()["served_blocks"] == len(blocks), what="the last acknowledgement")
        assert holder.num_pinned() == 0
        tier.close()


# The directory, and when it is wrong


def test_what_the_holder_evicts_is_not_found_any_more(holder: Holder, make_tier: MakeTier) -> None:
    keep(holder, 1, 2, 3)
    tier = make_tier(holder)
    assert tier.contains([key_of(1), key_of(2), key_of(3)]) == 3
    holder.drop(key_of(2))
    until(lambda: tier.contains([key_of(1), key_of(2), key_of(3)]) == 1, what="the event")


def test_a_wrong_directory_costs_a_miss(holder: Holder, make_tier: MakeTier) -> None:
    """What was evicted between the look-up and the fetch is asked for, and is not there."""
    tier = make_tier(holder)
    tier._directory.add(holder.peer, [key_of(1)])
    assert tier.contains([key_of(1)]) == 1
    assert read(tier, 1)[0] is None
    assert tier.contains([key_of(1)]) == 0, "it is not asked for again"
    assert holder.figures()["served_missing"] == 1


def test_one_of_two_holders_has_forgotten_it_the_other_gives_it(make_tier: MakeTier) -> None:
    with holding(ARENA_BYTES) as first, holding(ARENA_BYTES) as second:
        blocks = keep(second, *range(8))
        tier = make_tier(first, second)
        tier._directory.add(first.peer, [key_of(number) for number in blocks])
        for number, block in blocks.items():
            assert read(tier, number) == (number, block)
        tier.close()


def test_two_holders_share_the_work(make_tier: MakeTier) -> None:
    with holding(ARENA_BYTES) as first, holding(ARENA_BYTES) as second:
        keys = {n: bytes([n]) * 16 for n in range(8)}
        for each in (first, second):
            for number, key in keys.items():
                each.keep(key, number, b"x" * 100)
        tier = make_tier(first, second)
        for number, key in keys.items():
            assert tier.get(key, memoryview(bytearray(100))) == number
        until(lambda: first.figures()["served_blocks"] == second.figures()["served_blocks"] == 4, what="four each")
        tier.close()


def test_a_directory_that_fell_behind_begins_again(
    holder: Holder, make_tier: MakeTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(holder, 1)
    tier = make_tier(holder)
    log = holder.server._log
    monkeypatch.setattr(log, "_max_changes", 4)

    def many() -> None:
        for number in range(100):
            log.add(key_of(1000 + number), number % 2 == 0)

    holder.call(many)
    keep(holder, 2)
    until(lambda: tier.contains([key_of(1), key_of(2)]) == 2, what="everything once more")
    assert tier.figures().blocks == 2


# Faults


@pytest.fixture
def proxied(holder: Holder) -> Iterator[Proxy]:
    """What peers read goes through a proxy."""
    proxy = Proxy(holder.server.stream_port)
    holder.server.stream_port = proxy.port
    yield proxy
    proxy.close()


@pytest.mark.parametrize("at", [20, 5000, 39_000])
def test_a_byte_that_changes_on_the_way_is_a_miss_and_is_counted(
    at: int, holder: Holder, proxied: Proxy, make_tier: MakeTier
) -> None:
    blocks = keep(holder, 1, 2)
    tier = make_tier(holder)
    proxied.flip_at = at
    assert read(tier, 1)[0] is None
    assert tier.figures().corrupt == 1
    assert tier.contains([key_of(1)]) == 0, "this peer is not asked for it again"
    assert read(tier, 2) == (2, blocks[2])


@pytest.mark.parametrize("at", [0, 1, 3, 20_000, 40_010])
def test_a_stream_that_ends_too_early_is_an_error_and_the_next_one_works(
    at: int, holder: Holder, proxied: Proxy, make_tier: MakeTier
) -> None:
    blocks = keep(holder, 1)
    tier = make_tier(holder)
    proxied.cut_at = at
    with pytest.raises(TierError):
        read(tier, 1)
    assert read(tier, 1) == (1, blocks[1])
    until(lambda: holder.num_pinned() == 0, what="the pin of the block that was cut")


@pytest.mark.parametrize("garbage", [b"\0\0", b"\xff\xff" + b"x" * 70_000, b"\x03\0abc", b"\x01\0\xc1"])
def test_a_holder_that_sends_nonsense_is_an_error(
    garbage: bytes, holder: Holder, proxied: Proxy, make_tier: MakeTier
) -> None:
    keep(holder, 1)
    tier = make_tier(holder)
    proxied.instead = garbage
    with pytest.raises(TierError):
        read(tier, 1)


def test_what_does_not_come_ends_in_bounded_time_and_nothing_is_written_afterwards(
    holder: Holder, proxied: Proxy, make_tier: MakeTier
) -> None:
    blocks = keep(holder, 1)
    tier = make_tier(holder)
    proxied.hold_at = 10_000
    into = bytearray(BLOCK_BYTES)
    begun_s = time.monotonic()
    with pytest.raises(TierError, match=r"took too long|timed out"):
        tier.get(key_of(1), memoryview(into))
    assert time.monotonic() - begun_s < FETCH_TIMEOUT_S + SLACK_S
    before = bytes(into)
    proxied.release()
    assert read(tier, 1) == (1, blocks[1])
    assert into == before
    until(lambda: holder.num_pinned() == 0, what="every pin")


def test_a_stream_that_was_idle_for_too_long_is_replaced_without_a_word(
    holder: Holder, make_tier: MakeTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_blocks, "IDLE_S", 0.05)
    blocks = keep(holder, 1)
    tier = make_tier(holder)
    for _ in range(3):
        assert read(tier, 1) == (1, blocks[1])
        until(lambda: not holder.server.blocks._server._streams, what="the end of the idle stream")


def test_a_bit_that_flips_in_the_holders_arena_is_not_hidden_by_the_seal(holder: Holder, make_tier: MakeTier) -> None:
    """The seal is the holder's; the digest, which the engine compares, is that of what was computed."""
    block = keep(holder, 1)[1]
    entry = holder.call(lambda: holder.index.complete.get(key_of(1)))
    assert entry is not None
    holder.arena._mmap[entry.offset + 5] ^= 1
    digest, got = read(make_tier(holder), 1)
    assert (digest, got != block) == (1, True)


def test_a_peer_whose_blocks_never_come_is_not_counted_on(holder: Holder, make_tier: MakeTier) -> None:
    keep(holder, 1)
    tier = make_tier(holder)
    for _ in range(3):
        tier._links[holder.peer].bad()
    assert tier.contains([key_of(1)]) == 0
    until(lambda: tier.contains([key_of(1)]) == 1, what="one try after the pause")
    assert read(tier, 1)[0] == 1
    assert tier.contains([key_of(1)]) == tier.contains([key_of(1)]) == 1, "it is well again"


CHILD = """
import sys
from kvcache import peer_words as words
from kvcache.conformance import key_of
from transport.stream import Stream
stream = Stream.connect("127.0.0.1", int(sys.argv[1]), 5.0)
stream.send(words.encode(words.Join(sys.argv[2])), 5.0)
stream.send(words.encode(words.Fetch(key_of(1), int(sys.argv[3]))), 5.0)
print("asks", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("ends_by", ["death", "silence"])
def test_pins_of_an_asker_that_dies_or_hangs_while_a_block_is_sent_come_back(
    ends_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_bytes = 32 << 20  # more than sockets hold
    monkeypatch.setattr(peer_blocks, "SEND_TIMEOUT_S", 20.0 if ends_by == "death" else 0.5)
    with holding(num_bytes * 2) as holder:
        holder.keep(key_of(1), 1, bytes(num_bytes))
        command = [sys.executable, "-c", CHILD, str(holder.server.stream_port), holder.server.blocks.token]
        with subprocess.Popen(
            [*command, str(num_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        ) as asker:
            assert asker.stdout is not None
            assert asker.stdout.readline() == "asks\n"
            until(lambda: holder.num_pinned() == 1, what="the fetch")
            if ends_by == "death":
                asker.kill()
            begun_s = time.monotonic()
            until(lambda: holder.num_pinned() == 0, what="the pin")
            assert time.monotonic() - begun_s < 2.0
            assert holder.figures()["served_failed"] == 1
            asker.kill()
        assert holder.figures()["served_sending"] == 0


def test_nobody_there_is_no_error_and_after_close_every_get_is_one() -> None:
    with holding(ARENA_BYTES) as holder:
        peer = holder.peer
    tier = PeersTier([peer])
    assert tier.contains([key_of(1)]) == 0
    assert read(tier, 1)[0] is None
    tier.close()
    with pytest.raises(TierError, match="closed"):
        read(tier, 1)
    tier.close()


# Strangers


@pytest.fixture
def stranger(holder: Holder) -> Iterator[zmq.Socket[bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.setsockopt(zmq.RCVTIMEO, 5000)
    dealer.connect(holder.server.address)
    yield dealer
    context.destroy(0)


def hello(version: int = words.VERSION) -> bytes:
    return words.encode(words.Hello(version))


def test_another_version_is_refused_with_both_numbers(stranger: zmq.Socket[bytes]) -> None:
    stranger.send(hello(99))
    answer = words.decode_at_asker(stranger.recv())
    assert isinstance(answer, words.Welcome)
    assert f"version {words.VERSION}" in answer.why
    assert "99" in answer.why


def test_too_many_askers_are_refused(
    holder: Holder, stranger: zmq.Socket[bytes], make_tier: MakeTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tier(holder)
    monkeypatch.setattr(peer_server, "MAX_SESSIONS", 1)
    stranger.send(hello())
    answer = words.decode_at_asker(stranger.recv())
    assert isinstance(answer, words.Welcome)
    assert "connected already" in answer.why


def test_an_asker_that_falls_silent_is_forgotten(
    holder: Holder, stranger: zmq.Socket[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_server, "SILENCE_S", 0.2)
    stranger.send(hello())
    assert isinstance(words.decode_at_asker(stranger.recv()), words.Welcome)
    until(lambda: holder.figures()["served_askers"] == 0, what="the session's end")


@pytest.fixture(scope="module")
def attacked() -> Iterator[tuple[Holder, zmq.Socket[bytes]]]:
    """A holder, and a stranger's socket; afterwards a proper peer is served."""
    with holding(ARENA_BYTES) as holder:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        dealer = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(holder.server.address)
        yield holder, dealer
        until(lambda: holder.figures()["served_malformed"] > 0, what="garbage that was counted")
        block = keep(holder, 1)[1]
        tier = PeersTier([holder.peer])
        until(lambda: tier.contains([key_of(1)]), what="the directory")
        assert read(tier, 1) == (1, block)
        tier.close()
        context.destroy(0)


WORDS = st.sampled_from(
    [
        hello(),
        words.encode(words.Subscribe()),
        words.encode(words.Alive()),
        words.encode(words.Join("x")),
        words.encode(words.Fetch(key_of(1), 40_000)),
    ]
)
MESSAGES = st.one_of(
    st.binary(max_size=200), WORDS, st.tuples(WORDS, st.integers(0, 60)).map(lambda cut: cut[0][: cut[1]])
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(MESSAGES, min_size=1, max_size=4))
def test_garbage_is_counted_and_the_server_stays(
    attacked: tuple[Holder, zmq.Socket[bytes]], parts: list[bytes]
) -> None:
    holder, dealer = attacked
    dealer.send_multipart(parts)
    dealer.send(b"garbage")
    assert holder.figures()["served_sending"] == 0


def test_an_asker_of_an_older_protocol_is_not_heard(attacked: tuple[Holder, zmq.Socket[bytes]]) -> None:
    holder, _ = attacked
    before = holder.server.blocks.counts.malformed
    with socket.create_connection(("127.0.0.1", int(holder.peer.rpartition(":")[2])), timeout=5.0) as asker:
        asker.sendall(old_greeting(DEALER) + part(hello(), more=False))
        until(lambda: holder.server.blocks.counts.malformed > before, what="its word is dropped")


def test_a_holder_of_an_older_protocol_is_hung_up_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        tier = PeersTier([address])
        connection, _ = listener.accept()
        with connection:
            welcome = words.encode(words.Welcome(words.VERSION, "", 9, "token"))
            connection.sendall(old_greeting(ROUTER) + part(welcome, more=False))
            until(lambda: "ZMTP 3" in tier._links[address].why_down, what="the end of the connection")
        tier.close()


FRAMES = st.one_of(
    st.binary(max_size=100),
    st.lists(MESSAGES, max_size=3).map(lambda parts: b"".join(len(p).to_bytes(2, "little") + p for p in parts)),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=FRAMES, knows_token=st.booleans())
def test_garbage_on_a_stream_ends_the_stream_and_nothing_else(
    attacked: tuple[Holder, zmq.Socket[bytes]], frames: bytes, knows_token: bool
) -> None:
    holder, _ = attacked
    with socket.create_connection(("127.0.0.1", holder.server.stream_port), timeout=5.0) as stream:
        join = words.encode(words.Join(holder.server.blocks.token)) if knows_token else b""
        with suppress(OSError):  # it has hung up by then
            stream.sendall(len(join).to_bytes(2, "little") + join + frames)
            stream.shutdown(socket.SHUT_WR)
            while stream.recv(4096):
                pass
    assert holder.num_pinned() == 0


def test_a_stream_without_the_token_gets_nothing(holder: Holder) -> None:
    keep(holder, 1)
    streams = PeerStreams("127.0.0.1", holder.server.stream_port, "guessed")
    with pytest.raises(TransferError, match=r"ended|broke"):
        streams.fetch(key_of(1), memoryview(bytearray(BLOCK_BYTES)), 5.0)
    assert holder.figures()["served_blocks"] == 0
    streams.close()


def test_streams_are_limited(holder: Holder, make_tier: MakeTier) -> None:
    keep(holder, 1)
    holder.server.blocks._server._max_streams = 0
    tier = make_tier(holder)
    with pytest.raises(TierError):
        read(tier, 1)


GARBAGE = [
    b"",
    b"\xc1" * 50,
    words.encode(words.Known(b"odd", True)),
    words.encode(words.Changed(b"x" * 16, b"y")),
    words.encode(words.Welcome(99, "another version")),
    hello(),
]


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("welcomes", [True, False])
def test_a_holder_that_talks_nonsense_is_hung_up_on_and_costs_misses(garbage: bytes, welcomes: bool) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.LINGER, 0)
    router.setsockopt(zmq.RCVTIMEO, 5000)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    tier = PeersTier([f"127.0.0.1:{port}"])
    link = tier._links[f"127.0.0.1:{port}"]
    identity, _ = router.recv_multipart()
    if welcomes:
        router.send_multipart([identity, words.encode(words.Welcome(words.VERSION, "", 9, "token"))])
        until(lambda: connected(tier), what="the connection")
    router.send_multipart([identity, garbage])
    until(lambda: not connected(tier) and "not been reached" not in link.why_down, what="the end of the connection")
    assert tier.contains([key_of(1)]) == 0
    assert read(tier, 1)[0] is None
    until(lambda: router.recv_multipart()[0] != identity, what="the next connection")
    tier.close()
    context.destroy(0)
