"""Engines whose KV cache the processor leaves alone: hand-off and cache are a device's work, the tokens the same.

Real vLLM on a CPU, with its KV cache in a device made of host memory whose computation is always behind, or in a CUDA
driver in software, where every CUDA call is the one that a GPU would get.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster.launcher import Cluster
from tests.engine.client import ask, ask_all, metric, record
from tests.engine.clusters import CHUNKED, FLOAT32, on
from tests.engine.prompts import BLOCK, chat_messages
from tests.engine.test_cache import BIG, check_equal, completion, figures, flip, settled, tokens_of
from tests.engine.test_tensor_parallel import check_landed, ranks
from transport import nixl

pytestmark = [pytest.mark.engine, pytest.mark.host_memory, pytest.mark.timeout(600)]

LENGTHS = (BLOCK, BLOCK + 1, 5 * BLOCK - 1, 700, 1300, 2000)
LATE = "host:0.02"
"""Behind by 20 ms: a step's blocks are not there yet when the engine goes on."""

needs_nixl = pytest.mark.skipif(bool(nixl.unavailable()), reason=nixl.unavailable())


@pytest.mark.parametrize(
    ("device", "transport"), [("driver", "cuda_ipc"), pytest.param(LATE, "nixl", marks=needs_nixl)]
)
def test_every_token_is_the_same_handed_over_and_found_after_a_restart_of_each_engine(
    start: Callable[..., Cluster], plain: Cluster, device: str, transport: str
) -> None:
    cluster = start("1P1D", *CHUNKED, cache=BIG, transport=transport, connector=on(device))
    asked = [completion(length, 500 + index, stream=index % 2 == 0) for index, length in enumerate(LENGTHS)]
    asked.append({"messages": chat_messages(500, 78), "max_completion_tokens": 10, "ignore_eos": True})
    theirs = ask_all(plain.url, asked, 4)
    ours = ask_all(cluster.url, asked, 4)
    check_equal(ours, theirs)
    entry = record(cluster.url, ours[-2])
    assert (entry["outcome"], entry["path"]["transport"]) == ("landed", transport), entry
    assert entry["tokens"]["handed_over"] == LENGTHS[-1] - 1, entry
    settled(cluster)

    for name in ("prefill-0", "decode-0"):
        cluster.restart(name)
    again = ask_all(cluster.url, asked, 4)
    check_equal(again, theirs)
    tokens = tokens_of(cluster, again[-2])
    assert tokens["from_cache"] == LENGTHS[-1] - 1, tokens


def test_what_a_device_is_still_to_copy_is_given_to_nobody_else(start: Callable[..., Cluster], plain: Cluster) -> None:
    """So many requests at once, with engines so small, that every block is used again and again; then all of them from
    what was stored meanwhile."""
    small = ("--max-model-len", "2048", "--kv-cache-memory-bytes", "20971520")
    sizes = {f"arguments_{role}": FLOAT32 + CHUNKED + small for role in ("prefill", "decode")}
    cluster = start("1P1D", cache=BIG, transport="cuda_ipc", connector=on(LATE), **sizes)
    asked = [completion(200 + 97 * (number % 9), 600 + number % 24) for number in range(36)]
    theirs = ask_all(plain.url, asked, 8)
    check_equal(ask_all(cluster.url, asked, 8), theirs)
    settled(cluster)
    for name in ("prefill-0", "decode-0"):
        cluster.restart(name)
    again = ask_all(cluster.url, asked, 8)
    check_equal(again, theirs)
    tokens = [tokens_of(cluster, answer) for answer in again]
    assert all(each["from_cache"] + each["found_locally"] >= each["prompt"] // BLOCK * BLOCK - BLOCK for each in tokens)
    assert figures(cluster)["quarantined_blocks"] == 0


def test_a_byte_that_differs_on_arrival_or_in_the_cache_is_computed_again(
    start: Callable[..., Cluster], plain: Cluster
) -> None:
    faulty = {"faulty": {"flip_write": 2, "flip_byte": 12345}}
    cluster = start("1P1D", *CHUNKED, cache=BIG, transport="cuda_ipc", connector=on("host"), connector_prefill=faulty)
    body = completion(700, 650)
    theirs = ask(plain.url, body)
    broken = ask(cluster.url, body)
    check_equal([broken], [theirs])
    assert "digest differs" in record(cluster.url, broken)["path"]["why"]
    assert metric(cluster.url, "baton_fallbacks_total") == 1
    settled(cluster)
    cluster.restart("decode-0")
    flip(cluster, 70_000)
    check_equal([ask(cluster.url, body)], [theirs])
    assert figures(cluster)["quarantined_blocks"] == 1


@pytest.mark.full
@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)])
def test_ranks_of_either_side_write_their_heads_into_the_others_device(
    start: Callable[..., Cluster], plain: Cluster, sizes: tuple[int, int]
) -> None:
    senders, receivers = (ranks(count) for count in sizes)
    cluster = start(
        "1P1D",
        cache=BIG,
        transport="cuda_ipc",
        connector=on(LATE),
        arguments_prefill=senders,
        arguments_decode=receivers,
    )
    asked = [completion(length, 700 + length) for length in LENGTHS[3:]]
    answers = ask_all(cluster.url, asked, 2)
    check_equal(answers, ask_all(plain.url, asked, 2))
    check_landed(cluster, answers, asked, "cuda_ipc")
