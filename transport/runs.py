"""Which bytes of whose blocks go where: block ids as runs, heads as byte ranges, tokens as rows. Pure.

    ids                     [4 5 6 9] ──▶ [7 8 9 2]     as runs: 4..6 ──▶ 7..9, 9 ──▶ 2

    heads of a block, two ranks ──▶ one                 one rank ──▶ two
       rank 0 ┃a b┃ ──▶ ┃a b · ·┃                       ┃a b c d┃ ──┬──▶ ┃a b┃ rank 0
       rank 1 ┃c d┃ ──▶ ┃· · c d┃ rank 0                            └──▶ ┃c d┃ rank 1

    tokens, blocks of 4 ──▶ blocks of 2                 ┃0 1 2 3┃ ──▶ ┃0 1┃ ┃2 3┃     (each head has its own rows)

Memory and threading: none; everything here is arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from core.errors import TransferError
from core.layout import KVLayout

MAX_RANKS = 1024
"""A size comes from a peer or in a ticket, so it is bounded before anything is counted out."""


class Run(NamedTuple):
    """`num_blocks` blocks from `source` on, which go to as many from `target` on."""

    source: int
    target: int
    num_blocks: int


def runs(source_ids: Sequence[int], target_ids: Sequence[int]) -> Iterator[Run]:
    """The pairs of two equally long lists, joined where both sides count up by one."""
    first = 0
    for index in range(1, len(source_ids) + 1):
        if (
            index == len(source_ids)
            or source_ids[index] != source_ids[index - 1] + 1
            or target_ids[index] != target_ids[index - 1] + 1
        ):
            yield Run(source_ids[first], target_ids[first], index - first)
            first = index


class Lane(msgspec.Struct, frozen=True):
    """What one sending rank writes into each block of one receiving rank: the same heads, where each side has them.

    sender, receiver: tensor-parallel ranks. sender_start, receiver_start: the first byte inside a block.
    """

    sender: int
    receiver: int
    sender_start: int
    receiver_start: int
    num_bytes: int

    def tag(self, handoff: str) -> str:
        """Under which this lane's writes travel: a receiving rank has one landing for each sending rank."""
        return f"{handoff}@{self.sender}" if self.sender else handoff


def heads_of(num_heads: int, num_ranks: int, rank: int) -> range:
    """The KV heads that one rank holds. With more ranks than heads, neighbouring ranks hold the same one."""
    if num_ranks <= num_heads:
        share = num_heads // num_ranks
        return range(rank * share, (rank + 1) * share)
    head = rank // (num_ranks // num_heads)
    return range(head, head + 1)


def lanes(layout: KVLayout, senders: int, receivers: int) -> list[Lane]:
    """Every receiving rank's heads, each from exactly one sending rank; of ranks that hold the same head, receivers
    take turns. Raises TransferError for a pair of sizes that `objection` refuses."""
    why = objection(layout, senders, receivers)
    if why:
        raise TransferError(why)
    if senders == receivers:
        num_bytes = layout.head_bytes * len(heads_of(layout.num_kv_heads, senders, 0))
        return [Lane(rank, rank, 0, 0, num_bytes) for rank in range(senders)]
    return [lane for receiver in range(receivers) for lane in _lanes_to(layout, senders, receivers, receiver)]


def objection(layout: KVLayout, senders: int, receivers: int) -> str:
    """Why heads cannot go from so many ranks to so many; empty if they can."""
    heads = layout.num_kv_heads
    for size in (senders, receivers):
        if not 1 <= size <= MAX_RANKS or max(size, heads) % min(size, heads):
            return f"{size} tensor-parallel ranks cannot share {heads} KV heads equally"
    if senders != receivers and not layout.has_heads_in_one_piece:
        return (
            f"tensor parallel sizes {senders} (sending) and {receivers} (receiving) differ, and blocks in the order "
            f"{layout.order} do not keep a head in one piece"
        )
    return ""


def _lanes_to(layout: KVLayout, senders: int, receivers: int, receiver: int) -> Iterator[Lane]:
    wanted = heads_of(layout.num_kv_heads, receivers, receiver)
    holders = _holders(layout.num_kv_heads, senders)
    at = 0
    while at < len(wanted):
        ranks = holders[wanted[at]]
        sender = ranks[receiver % len(ranks)]
        held = heads_of(layout.num_kv_heads, senders, sender)
        count = min(held.stop, wanted.stop) - wanted[at]
        offset = wanted[at] - held.start
        size = layout.head_bytes
        yield Lane(sender, receiver, offset * size, at * size, count * size)
        at += count


def _holders(num_heads: int, num_ranks: int) -> dict[int, list[int]]:
    holders: dict[int, list[int]] = {}
    for rank in range(num_ranks):
        for head in heads_of(num_heads, num_ranks, rank):
            holders.setdefault(head, []).append(rank)
    return holders


class Rows(NamedTuple):
    """The same `num_tokens` tokens in a sender's and in a receiver's block: which block, in the order of the prompt,
    and which row of it."""

    source: int
    source_row: int
    target: int
    target_row: int
    num_tokens: int


def rows(first_token: int, num_tokens: int, source_size: int, target_size: int) -> Iterator[Rows]:
    """Cuts tokens [first, first + num) of a prompt where a block of either side ends."""
    token, end = first_token, first_token + num_tokens
    while token < end:
        source, source_row = divmod(token, source_size)
        target, target_row = divmod(token, target_size)
        count = min(source_size - source_row, target_size - target_row, end - token)
        yield Rows(source, source_row, target, target_row, count)
        token += count


class RowCopy(NamedTuple):
    """Bytes of one head's rows: `num_bytes` from `source_start` of the source block to `target_start` of the target."""

    source: int
    target: int
    source_start: int
    target_start: int
    num_bytes: int


def row_copies(source: KVLayout, target: KVLayout, first_token: int, num_tokens: int) -> list[RowCopy]:
    """Tokens between blocks of different sizes, head by head; blocks are numbered in the order of the prompt.

    Raises TransferError, with both sides' values, where a token of a head is no row of bytes, or rows differ in size.
    """
    for layout in (source, target):
        if not layout.row_bytes:
            raise TransferError(
                f"blocks of {source.block_size} and of {target.block_size} tokens: blocks in the order {layout.order} "
                f"packed for {layout.isa or 'this device'} have no rows of tokens"
            )
    if (source.row_bytes, source.num_kv_heads) != (target.row_bytes, target.num_kv_heads):
        raise TransferError(
            f"{source.num_kv_heads} heads with rows of {source.row_bytes} bytes cannot go to {target.num_kv_heads} "
            f"with rows of {target.row_bytes}"
        )
    size = source.row_bytes
    return [
        RowCopy(
            source=part.source,
            target=part.target,
            source_start=head * source.head_bytes + part.source_row * size,
            target_start=head * target.head_bytes + part.target_row * size,
            num_bytes=part.num_tokens * size,
        )
        for part in rows(first_token, num_tokens, source.block_size, target.block_size)
        for head in range(source.num_kv_heads)
    ]
