"""Which bytes of whose blocks go where: every id, head and row exactly once, and to its own place."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from core.errors import TransferError
from core.layout import KVLayout
from transport.runs import Lane, heads_of, lanes, objection, row_copies, rows, runs

timeless = settings(deadline=None)
ids = st.integers(0, 12)


def layout(num_heads: int = 4, block_size: int = 8, **more: Any) -> KVLayout:
    """Without packing: 6 bytes a row."""
    fields = {"order": "LBHNC", "isa": ""} | more
    return KVLayout("m", "bfloat16", 2, num_heads, 3, block_size, num_heads * block_size * 6, **fields)


@timeless
@given(pairs=st.lists(st.tuples(ids, ids)))
def test_runs_name_every_pair_once_in_order_and_none_could_be_longer(pairs: list[tuple[int, int]]) -> None:
    found = list(runs([source for source, _ in pairs], [target for _, target in pairs]))
    assert [(run.source + i, run.target + i) for run in found for i in range(run.num_blocks)] == pairs
    for left, right in itertools.pairwise(found):
        assert (right.source, right.target) != (left.source + left.num_blocks, left.target + left.num_blocks)


def test_a_long_list_of_neighbours_is_one_run() -> None:
    assert [run.num_blocks for run in runs(range(1000), range(7, 1007))] == [1000]


sizes = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16])


def content(num_heads: int, num_ranks: int, rank: int, head_bytes: int) -> bytearray:
    """One rank's block, each byte of which says whose head it is."""
    return bytearray(b"".join(bytes([head + 1]) * head_bytes for head in heads_of(num_heads, num_ranks, rank)))


@timeless
@given(num_heads=sizes, senders=sizes, receivers=sizes)
def test_every_receiver_gets_each_of_its_heads_from_one_sender(num_heads: int, senders: int, receivers: int) -> None:
    shape = layout(num_heads)
    if objection(shape, senders, receivers):
        with pytest.raises(TransferError, match="cannot share"):
            lanes(shape, senders, receivers)
        return
    sources = [content(num_heads, senders, rank, shape.head_bytes) for rank in range(senders)]
    wanted = [content(num_heads, receivers, rank, shape.head_bytes) for rank in range(receivers)]
    blocks = [bytearray(len(block)) for block in wanted]
    between = lanes(shape, senders, receivers)
    for lane in between:
        into, source = blocks[lane.receiver], sources[lane.sender]
        at, end = lane.receiver_start, lane.receiver_start + lane.num_bytes
        assert not any(into[at:end]), "nothing is written twice"
        into[at:end] = source[lane.sender_start : lane.sender_start + lane.num_bytes]
    assert blocks == wanted
    pairs = [(lane.sender, lane.receiver) for lane in between]
    assert len(set(pairs)) == len(pairs), "one lane between two ranks, so its tag is its own"


@timeless
@given(num_heads=sizes, senders=sizes, receivers=sizes)
def test_ranks_that_hold_the_same_head_share_the_work(num_heads: int, senders: int, receivers: int) -> None:
    shape = layout(num_heads)
    assume(not objection(shape, senders, receivers) and senders != receivers)
    given_by = [0] * senders
    for lane in lanes(shape, senders, receivers):
        given_by[lane.sender] += lane.num_bytes
    if receivers % senders == 0:
        assert len(set(given_by)) == 1


def test_one_to_two_and_two_to_one() -> None:
    half = 2 * layout().head_bytes
    assert lanes(layout(), 1, 2) == [Lane(0, 0, 0, 0, half), Lane(0, 1, half, 0, half)]
    assert lanes(layout(), 2, 1) == [Lane(0, 0, 0, 0, half), Lane(1, 0, 0, half, half)]
    assert [lane.tag("h") for lane in lanes(layout(), 2, 1)] == ["h", "h@1"]


@pytest.mark.parametrize("size", [0, -2, 3, 1 << 40])
def test_sizes_that_cannot_be_are_refused_at_once(size: int) -> None:
    for sizes in ((size, 2), (2, size)):
        with pytest.raises(TransferError, match=f"{size} tensor-parallel ranks cannot share 4 KV heads equally"):
            lanes(layout(4), *sizes)


def test_interleaved_heads_go_between_equal_sizes_only() -> None:
    other = layout(order="LBNHC")
    assert lanes(other, 2, 2) == lanes(layout(), 2, 2)
    with pytest.raises(TransferError, match=r"1 \(sending\) and 2 \(receiving\).*LBNHC"):
        lanes(other, 1, 2)


token_sizes = st.integers(1, 9)


@timeless
@given(first=st.integers(0, 40), count=st.integers(0, 40), source_size=token_sizes, target_size=token_sizes)
def test_rows_name_every_token_once_and_cross_no_border(
    first: int, count: int, source_size: int, target_size: int
) -> None:
    tokens = []
    for part in rows(first, count, source_size, target_size):
        assert part.source_row + part.num_tokens <= source_size
        assert part.target_row + part.num_tokens <= target_size
        source = [part.source * source_size + part.source_row + i for i in range(part.num_tokens)]
        assert source == [part.target * target_size + part.target_row + i for i in range(part.num_tokens)]
        tokens += source
    assert tokens == list(range(first, first + count))


def block(shape: KVLayout, number: int, end: int) -> bytearray:
    """A block in which every byte of a row says which head and token it is; 0 behind the prompt's end."""
    tokens = range(number * shape.block_size, (number + 1) * shape.block_size)
    row = shape.row_bytes
    return bytearray(
        b"".join(
            bytes([1 + head * 50 + token]) * row if token < end else bytes(row)
            for head in range(shape.num_kv_heads)
            for token in tokens
        )
    )


@timeless
@given(count=st.integers(1, 48), heads=st.integers(1, 4), source_size=token_sizes, target_size=token_sizes)
def test_rows_of_every_head_reach_blocks_of_another_size(
    count: int, heads: int, source_size: int, target_size: int
) -> None:
    ours, theirs = layout(heads, source_size), layout(heads, target_size)
    sources = [block(ours, number, count) for number in range(-(-count // source_size))]
    wanted = [block(theirs, number, count) for number in range(-(-count // target_size))]
    blocks = [bytearray(len(each)) for each in wanted]
    for copy in row_copies(ours, theirs, 0, count):
        source = sources[copy.source][copy.source_start : copy.source_start + copy.num_bytes]
        blocks[copy.target][copy.target_start : copy.target_start + copy.num_bytes] = source
    assert blocks == wanted


def test_packed_blocks_have_no_rows_and_say_both_sizes() -> None:
    packed = layout(4, 32, isa="amx")
    assert packed.row_bytes == 0
    with pytest.raises(TransferError, match=r"blocks of 32 and of 64 tokens.*packed for amx"):
        row_copies(packed, layout(4, 64, isa="amx"), 0, 64)
    with pytest.raises(TransferError, match="4 heads with rows of 6 bytes cannot go to 2 with rows of 6"):
        row_copies(layout(4), layout(2), 0, 8)


def test_instances_of_other_sizes_have_one_fingerprint_and_other_heads_do_not() -> None:
    assert layout(4).fingerprint() != msgspec.structs.replace(layout(4), num_kv_heads=2).fingerprint()
