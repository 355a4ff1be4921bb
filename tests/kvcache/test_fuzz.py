"""The cache's words, from engines and from other hosts: hostile bytes are a ProtocolError and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ProtocolError
from kvcache import peer_words, wire
from kvcache.keys import KEY_BYTES
from tests.transport.fuzzing import FUZZ, MUTATIONS, mutated

KEY = bytes(range(KEY_BYTES % 256))[:KEY_BYTES].ljust(KEY_BYTES, b"k")
DECODERS: list[Callable[[bytes], object]] = [
    wire.decode_at_server,
    wire.decode_at_client,
    peer_words.decode_at_holder,
    peer_words.decode_at_asker,
    peer_words.decode_asked,
    peer_words.decode_answered,
]
PROPER = [
    wire.frame(wire.Search(1, KEY * 3, True))[wire.LENGTH.size :],
    wire.frame(wire.Found(1, [wire.Slot(0, 7)], [wire.Grant(1, 4096)]))[wire.LENGTH.size :],
    peer_words.encode(peer_words.Hello(1)),
    peer_words.encode(peer_words.Known(KEY * 5, True)),
    peer_words.encode(peer_words.Fetch(KEY, 4096)),
    peer_words.encode(peer_words.Sealed(1, 2)),
]


@pytest.mark.parametrize("decode", DECODERS, ids=lambda decode: f"{decode.__module__}.{decode.__name__}")
@FUZZ
@given(content=st.binary(max_size=300))
def test_random_bytes(decode: Callable[[bytes], object], content: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(content)


@pytest.mark.parametrize("pair", list(zip(DECODERS, PROPER, strict=True)), ids=lambda pair: str(pair[0].__name__))
@FUZZ
@given(changes=MUTATIONS, end=st.integers(0, 1 << 16))
def test_proper_words_with_some_bytes_changed(
    pair: tuple[Callable[[bytes], object], bytes], changes: list[tuple[int, int]], end: int
) -> None:
    decode, proper = pair
    decode(proper)
    try:
        decode(mutated(proper, changes, end))
    except ProtocolError:
        return


@pytest.mark.parametrize("decode", DECODERS, ids=lambda decode: f"{decode.__module__}.{decode.__name__}")
@pytest.mark.parametrize("nest", [b"\x91", b"\x81\xa1x", b"\x81\xa4type\xa5Found\xa5slots\x91"])
def test_nesting_without_an_end(decode: Callable[[bytes], object], nest: bytes) -> None:
    for content in (nest * 100_000, b"\x82\xa4type\xa6Search\xa1x" + nest * 100_000):
        with pytest.raises(ProtocolError):
            decode(content)


@FUZZ
@given(head=st.binary(min_size=4, max_size=4))
def test_no_frame_is_read_that_is_larger_than_any(head: bytes) -> None:
    try:
        assert 0 < wire.frame_bytes(head) <= wire.MAX_FRAME_BYTES
    except ProtocolError:
        return
