"""Hostile descriptions and packets: refused or dropped, kept within bounds; service goes on."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import TransferError
from tests.poll import until
from tests.transport.fuzzing import FUZZ, MUTATIONS, mutated
from tests.transport.memory import Owned
from transport.conformance_pair import finish
from transport.shm import ShmTransport
from transport.shm_wire import Finished, Opening, encode_packet
from transport.shm_wire import decode_description as decode_shm
from transport.zmq_tcp import ZmqTransport


@pytest.fixture(scope="module")
def owners() -> Iterator[dict[str, tuple[Owned, Owned]]]:
    """Sender and receiver by scheme."""
    made: dict[str, tuple[Owned, Owned]] = {
        "shm": (Owned(ShmTransport(), fill=9), Owned(ShmTransport())),
        "zmq": (Owned(ZmqTransport("127.0.0.1"), fill=9), Owned(ZmqTransport("127.0.0.1"))),
    }
    for _, receiver in made.values():
        receiver.transport.describe()
    before = _traces()
    yield made
    until(lambda: _traces() <= before + 4, what="nothing stays of them")
    for sender, receiver in made.values():
        landing = receiver.expect("proper", [2])
        endpoint = sender.transport.connect(receiver.transport.describe())
        finish(endpoint.write("proper", sender.blocks([2]), receiver.blocks([2]), b"."))
        until(lambda landing=landing: landing.poll() == [b"."], what="a proper notice")  # type: ignore[misc]
        endpoint.close()
        for owned in (sender, receiver):
            owned.transport.close()


@pytest.mark.parametrize("scheme", ["shm", "zmq"])
@FUZZ
@given(content=st.binary(max_size=300))
def test_random_descriptions(owners: dict[str, tuple[Owned, Owned]], scheme: str, content: bytes) -> None:
    with pytest.raises(TransferError):
        owners[scheme][0].transport.connect(content)


@pytest.mark.parametrize("scheme", ["shm", "zmq"])
@FUZZ
@given(changes=MUTATIONS, end=st.integers(0, 1 << 16))
def test_descriptions_with_some_bytes_changed_are_refused_or_lead_nowhere(
    owners: dict[str, tuple[Owned, Owned]], scheme: str, changes: list[tuple[int, int]], end: int
) -> None:
    sender, receiver = owners[scheme]
    with contextlib.suppress(TransferError):
        endpoint = sender.transport.connect(mutated(receiver.transport.describe(), changes, end))
        with contextlib.suppress(TransferError):
            endpoint.write("t", sender.blocks([0]), receiver.blocks([0]))
        endpoint.close()


PACKETS = st.one_of(
    st.binary(max_size=300),
    st.builds(Opening, st.text(max_size=20)).map(encode_packet),
    st.builds(Finished, st.text(max_size=20), st.binary(max_size=100)).map(encode_packet),
)


@FUZZ
@given(packets=st.lists(PACKETS, min_size=1, max_size=8), changes=MUTATIONS)
def test_shm_packets(
    owners: dict[str, tuple[Owned, Owned]], packets: list[bytes], changes: list[tuple[int, int]]
) -> None:
    receiver = owners["shm"][1]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect(b"\0" + decode_shm(receiver.transport.describe()).socket.encode())
        stranger.settimeout(5)
        for packet in filter(None, packets):
            stranger.send(packet)
            stranger.send(mutated(packet, changes, len(packet) - 1))


def test_words_for_tags_that_nobody_expects_are_kept_within_bounds(owners: dict[str, tuple[Owned, Owned]]) -> None:
    transport: Any = owners["shm"][1].transport
    name = decode_shm(transport.describe()).socket
    before = transport.malformed
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect(b"\0" + name.encode())
        for number in range(3000):
            stranger.send(encode_packet(Opening(f"nobody-{number}")))
        for _ in range(50):
            stranger.send(encode_packet(Finished("one", b"x" * 1000)))
        until(lambda: transport.malformed >= before + 30, what="those too many are counted")
    assert len(transport._box._early) <= 1024


def _traces() -> int:
    return len(os.listdir("/proc/self/fd")) + threading.active_count() + _num_mappings()


def _num_mappings() -> int:
    return Path("/proc/self/maps").read_text().count("baton-kv")
