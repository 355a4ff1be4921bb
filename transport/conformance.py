"""What every transport must do, as one check that each implementation runs, and so does each wrapped in `faulty`.

    check_transport(maker)      maker() makes a transport; two are made, a sender's and a receiver's, per check

Memory model: see transport/conformance_pair.py. Gaps between blocks are part of the memory, and must stay unchanged.
Threading: everything runs on the caller's thread; every wait is bounded.
"""

from __future__ import annotations

import functools
import os
import random
import threading
from collections.abc import Callable

from core.errors import TransferError
from transport.base import Blocks, Landing, TransferState
from transport.conformance_pair import QUIET_S, Maker, Pair, connected, finish, wait_for


def check_transport(maker: Maker) -> None:
    """Raises AssertionError at the first thing that a transport must do and this one does not."""
    for check in (
        check_lands_where_it_should,
        check_byte_ranges,
        check_tags_apart,
        check_parts_of_the_same_blocks_apart,
        check_notice_comes_last,
        check_misfits_are_refused,
        check_only_expected_blocks_are_written,
        check_closed_landing_is_a_fence,
        check_closed_endpoint_is_a_fence,
        check_cancel,
        check_read,
        check_garbage_descriptions,
    ):
        with connected(maker) as pair:
            check(pair)
    check_leaves_nothing(maker)


def check_lands_where_it_should(pair: Pair) -> None:
    """Random ids and runs, every region: the bytes arrive in their places and nowhere else."""
    dice = random.Random(3)
    wanted = pair.receiver.snapshot()
    for turn, num_blocks in enumerate((1, 3, 4)):
        expected, transfers = [], []
        ids = tuple(range(num_blocks)) if turn == 1 else tuple(dice.sample(range(4), num_blocks))
        landing = pair.expect(f"turn {turn}", *(Blocks(region.id, ids) for region in pair.receiver.regions))
        for region in pair.receiver.regions:
            local_ids = tuple(dice.sample(range(region.num_blocks), num_blocks)) if turn != 1 else ids
            expected.append(Blocks(region.id, ids))
            transfers.append(pair.endpoint.write(f"turn {turn}", Blocks(region.id, local_ids), expected[-1]))
            for local_id, remote_id in zip(local_ids, ids, strict=True):
                pair.receiver.put(wanted, region.id, remote_id, pair.sender.block(region.id, local_id))
        finish(*transfers)
        assert pair.receiver.snapshot() == wanted, "bytes differ from what was written, or others were touched"
        assert landing.num_written() in (None, 3 * num_blocks), landing.num_written()
        assert landing.digest() in (None, pair.receiver.digest(expected)), "the landing's digest is wrong"
        landing.close()


def check_byte_ranges(pair: Pair) -> None:
    """Parts of blocks land in their byte range; a block counts once every byte of it has come."""
    wanted, ids, local_ids = pair.receiver.snapshot(), (2, 0), (1, 3)
    landing = pair.expect("parts", Blocks(1, ids), Blocks(2, ids))
    for region, parts in ((1, ((0, 300), (700, 300), (300, 400))), (2, ((1 << 20, 1 << 19), (0, 1 << 20)))):
        before = landing.num_written()
        for start, num_bytes in parts:
            assert landing.num_written() in (None, before), "a block counts although bytes are missing"
            local, remote = Blocks(region, local_ids, start, num_bytes), Blocks(region, ids, start, num_bytes)
            finish(pair.endpoint.write("parts", local, remote))
            for local_id, remote_id in zip(local_ids, ids, strict=True):
                content = pair.sender.block(region, local_id)[start : start + num_bytes]
                pair.receiver.put(wanted, region, remote_id, content, start)
            assert pair.receiver.snapshot() == wanted, "a byte range landed elsewhere"
    finish(pair.endpoint.write("parts", Blocks(1, (5,), 10, 20), Blocks(1, (2,), 30, 20)))
    assert landing.num_written() in (None, 4)
    digest = pair.receiver.digest([Blocks(1, ids), Blocks(2, ids)])
    assert landing.digest() in (None, digest), "a digest over parts, or over a rewritten part, is wrong"


def check_tags_apart(pair: Pair) -> None:
    """Two hand-offs interleaved: each landing counts and digests its own."""
    expected = {tag: Blocks(0, ids) for tag, ids in (("even", (0, 2, 4, 6)), ("odd", (7, 5, 3, 1)))}
    landings = {tag: pair.expect(tag, blocks) for tag, blocks in expected.items()}
    transfers = []
    for position in range(4):
        for tag, blocks in expected.items():
            remote = Blocks(0, blocks.ids[position : position + 1])
            notice = tag.encode() if position == 3 else None
            transfers.append(pair.endpoint.write(tag, Blocks(0, remote.ids), remote, notice))
    finish(*transfers)
    for tag, landing in landings.items():
        notices: list[bytes] = []
        wait_for(functools.partial(_has_notice, landing, notices), "a notice")
        assert notices == [tag.encode()], notices
        assert landing.num_written() in (None, 4)
        assert landing.digest() in (None, pair.sender.digest([expected[tag]])), "digests of both sides differ"


def check_parts_of_the_same_blocks_apart(pair: Pair) -> None:
    """Two senders of one hand-off, each with a tag and a byte range: each landing counts and digests its own range."""
    expected = {"low": Blocks(1, (3, 1), 0, 400), "high": Blocks(1, (3, 1), 400, 600)}
    landings = {tag: pair.expect(tag, blocks) for tag, blocks in expected.items()}
    for tag, blocks in expected.items():
        finish(pair.endpoint.write(tag, Blocks(1, (0, 2), blocks.start, blocks.num_bytes), blocks))
        assert landings[tag].num_written() in (None, 2), "a part of a block counts once every byte of it has come"
    for tag, blocks in expected.items():
        assert landings[tag].digest() in (None, pair.receiver.digest([blocks])), "a digest over a part is wrong"
    if landings["low"].num_written() is not None:
        other = Blocks(1, (3, 1), 300, 200)
        finish(pair.endpoint.write("low", other, other), state=TransferState.FAILED)


def check_notice_comes_last(pair: Pair) -> None:
    """When a notice is there, so is everything that was written before it under its tag."""
    ids = tuple(range(4))
    landing = pair.expect("big", Blocks(2, ids), Blocks(0, ids))
    first = pair.endpoint.write("big", Blocks(2, ids), Blocks(2, ids))
    second = pair.endpoint.write("big", Blocks(0, ids), Blocks(0, ids), b"all there")
    notices: list[bytes] = []

    wait_for(lambda: second.poll() is not TransferState.FAILED and _has_notice(landing, notices), "the notice")
    assert notices == [b"all there"]
    assert all(pair.receiver.block(r, i) == pair.sender.block(r, i) for r in (0, 2) for i in ids), "data came later"
    finish(first, second)
    finish(pair.endpoint.write("big", Blocks(0, ()), Blocks(0, ()), b"only a word"))
    wait_for(lambda: landing.poll() == [b"only a word"], "a notice without data")


def check_misfits_are_refused(pair: Pair) -> None:
    """Arguments that do not fit the regions raise, at once, on the caller's side."""
    misfits = [
        (Blocks(9, (0,)), Blocks(0, (0,))),
        (Blocks(0, (0,)), Blocks(9, (0,))),
        (Blocks(0, (24,)), Blocks(0, (0,))),
        (Blocks(0, (0,)), Blocks(0, (24,))),
        (Blocks(0, (-1,)), Blocks(0, (0,))),
        (Blocks(0, (0, 1)), Blocks(0, (0,))),
        (Blocks(0, (0,)), Blocks(1, (0,))),
        (Blocks(0, (0,), 4000, 97), Blocks(0, (0,), 4000, 97)),
        (Blocks(0, (0,), -1, 10), Blocks(0, (0,), 0, 10)),
    ]
    for local, remote in misfits:
        _check_raises(pair.endpoint.write, "misfit", local, remote)
        _check_raises(pair.endpoint.read, remote, local)
    _check_raises(pair.expect, "twice", Blocks(0, (1, 1)))
    _check_raises(pair.expect, "outside", Blocks(0, (24,)))
    landing = pair.expect("open", Blocks(0, (1,)))
    _check_raises(pair.expect, "open", Blocks(0, (1,)))
    landing.close()


def check_only_expected_blocks_are_written(pair: Pair) -> None:
    """Where the receiver can refuse, it does: unknown tags and unexpected blocks are never written."""
    landing = pair.expect("known", Blocks(0, (1, 2)))
    if landing.num_written() is None:
        return
    before = pair.receiver.snapshot()
    finish(
        pair.endpoint.write("known", Blocks(0, (1, 3)), Blocks(0, (1, 3))),
        pair.endpoint.write("known", Blocks(1, (1,)), Blocks(1, (1,))),
        pair.endpoint.write("unknown", Blocks(0, (1,)), Blocks(0, (1,)), b"a word"),
        state=TransferState.FAILED,
    )
    assert pair.receiver.snapshot() == before, "something unexpected was written"
    assert landing.num_written() == 0


def check_closed_landing_is_a_fence(pair: Pair) -> None:
    """Once `close` has said True, nothing is written under the tag."""
    landing = pair.expect("fenced", Blocks(2, (0, 1)))
    running = pair.endpoint.write("fenced", Blocks(2, (0, 1)), Blocks(2, (0, 1)))
    is_fence = landing.close()
    before = pair.receiver.snapshot()
    wait_for(lambda: running.poll() is not TransferState.RUNNING, "a write into a closed landing ends")
    late = pair.endpoint.write("fenced", Blocks(2, (2, 3)), Blocks(2, (0, 1)), b"late")
    wait_for(lambda: late.poll() is not TransferState.RUNNING, "a write after the close ends")
    if is_fence:
        assert pair.receiver.snapshot() == before, "a closed landing was written"
        assert late.poll() is TransferState.FAILED
    assert landing.close() is is_fence, "closing twice says the same"


def check_closed_endpoint_is_a_fence(pair: Pair) -> None:
    """After `close` every transfer has ended, and no new one begins."""
    landing = pair.expect("ends", Blocks(2, (0, 1)))
    assert pair.endpoint.failure() == ""
    running = pair.endpoint.write("ends", Blocks(2, (0, 1)), Blocks(2, (0, 1)))
    pair.endpoint.close()
    wait_for(lambda: running.poll() is not TransferState.RUNNING, "a running transfer ends with its endpoint", 1.0)
    assert pair.endpoint.failure(), "a closed endpoint says so"
    if landing.close():  # what was under way may have landed until here
        before = pair.receiver.snapshot()
    else:
        before = pair.receiver.snapshot()
        threading.Event().wait(QUIET_S)
    finish(pair.endpoint.write("ends", Blocks(2, (2, 3)), Blocks(2, (0, 1))), state=TransferState.FAILED)
    assert pair.receiver.snapshot() == before, "a closed endpoint wrote"
    pair.endpoint.close()


def check_cancel(pair: Pair) -> None:
    """A cancelled transfer ends; one that is done stays done; the endpoint lives on."""
    ids = tuple(range(4))
    landing = pair.expect("stop", Blocks(2, ids))
    transfer = pair.endpoint.write("stop", Blocks(2, ids), Blocks(2, ids))
    transfer.cancel()
    wait_for(lambda: transfer.poll() is not TransferState.RUNNING, "a cancelled transfer ends")
    again = pair.endpoint.write("stop", Blocks(2, ids), Blocks(2, ids))
    finish(again)
    again.cancel()
    finish(again)
    assert landing.num_written() in (None, 4)


def check_read(pair: Pair) -> None:
    """A read brings the peer's blocks here, and changes nothing there."""
    there, wanted = pair.receiver.snapshot(), pair.sender.snapshot()
    transfers = []
    for region, remote_ids, local_ids in ((0, (5, 9, 6, 7), (3, 4, 5, 11)), (1, (39, 0), (0, 1)), (2, (1, 2), (3, 0))):
        transfers.append(pair.endpoint.read(Blocks(region, remote_ids), Blocks(region, local_ids)))
        for remote_id, local_id in zip(remote_ids, local_ids, strict=True):
            pair.sender.put(wanted, region, local_id, pair.receiver.block(region, remote_id))
    transfers.append(pair.endpoint.read(Blocks(1, (7,), 100, 50), Blocks(1, (8,), 10, 50)))
    pair.sender.put(wanted, 1, 8, pair.receiver.block(1, 7)[100:150], 10)
    finish(*transfers)
    assert pair.sender.snapshot() == wanted, "a read brought other bytes, or brought them elsewhere"
    assert pair.receiver.snapshot() == there, "a read changed the peer"


def check_garbage_descriptions(pair: Pair) -> None:
    """A description is untrusted: garbage raises TransferError, or gives an endpoint that fails; nothing else."""
    good, dice = pair.receiver.transport.describe(), random.Random(5)
    garbage = [b"", b"\x00", b"garbage", good[:-1], good + b"\x00", good[: len(good) // 2], b"\x91" * 100_000]
    for wire in garbage:
        _check_raises(pair.sender.transport.connect, wire)
    for _ in range(30):
        mutated = bytearray(good)
        mutated[dice.randrange(len(good))] ^= 1 << dice.randrange(8)
        try:
            endpoint = pair.sender.transport.connect(bytes(mutated))
        except TransferError:
            continue
        endpoint.close()


def check_leaves_nothing(maker: Maker) -> None:
    """After everything is closed, there are as many descriptors and threads as before."""
    _use_once(maker)  # what a library opens once per process is open from here on
    before = _num_open()
    for _ in range(3):
        _use_once(maker)
    wait_for(lambda: _num_open() <= before, f"descriptors and threads go back to {before}")


def _use_once(maker: Maker) -> None:
    with connected(maker) as pair:
        landing = pair.expect("leak", Blocks(0, (0,)))
        finish(pair.endpoint.write("leak", Blocks(0, (0,)), Blocks(0, (0,)), b"."))
        landing.close()


def _num_open() -> int:
    return len(os.listdir("/proc/self/fd")) + threading.active_count()


def _has_notice(landing: Landing, notices: list[bytes]) -> bool:
    notices.extend(landing.poll())
    return bool(notices)


def _check_raises(call: Callable[..., object], *arguments: object) -> None:
    try:
        call(*arguments)
    except TransferError:
        return
    raise AssertionError("TransferError was not raised")
