"""The shared KV cache behind instances of several tensor-parallel ranks: each keeps and loads its heads of a block."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.launcher import Cluster
from tests.engine.client import ask, ask_all, record
from tests.engine.prompts import BLOCK, token_prompt
from tests.engine.test_cache import BIG, check_equal, completion, figures, flip, settled, tokens_of
from tests.engine.test_tensor_parallel import ranks

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

LENGTHS = (BLOCK + 1, 3 * BLOCK, 700, 1300)  # of the first, one block is kept


def test_two_ranks_find_what_two_ranks_stored_before_a_restart(start: Any, plain: Cluster) -> None:
    cluster = start("0P1D", cache=BIG, arguments_decode=ranks(2))
    asked = [completion(length, 800 + length) for length in LENGTHS]
    theirs = ask_all(plain.url, asked, 4)
    check_equal(ask_all(cluster.url, asked, 4), theirs)
    settled(cluster)
    cluster.restart("decode-0")
    again = ask_all(cluster.url, asked, 4)
    check_equal(again, theirs)
    for body, answer in zip(asked, again, strict=True):
        tokens, num_full = tokens_of(cluster, answer), len(body["prompt"]) // BLOCK * BLOCK
        assert tokens["from_cache"] + tokens["found_locally"] >= num_full - BLOCK, tokens
        assert tokens["from_cache"] > 0, tokens

    settled(cluster)
    cluster.restart("decode-0")
    (from_host,) = record(cluster.url, again[0])["decode"]["from_cache"]
    flip(cluster, from_host["bytes"] // 2 + 1000)  # what the second rank keeps of the first slot
    check_equal(ask_all(cluster.url, asked, 1), theirs)
    assert figures(cluster)["quarantined_blocks"] == 1


def test_sizes_keep_their_blocks_apart_and_hand_over_what_the_other_lacks(start: Any, plain: Cluster) -> None:
    cluster = start("1P1D", cache=BIG, arguments_prefill=ranks(2), arguments_decode=ranks(1))
    body = completion(1000, 900)
    expected = ask(plain.url, body).outcome()
    first = ask(cluster.url, body)
    assert first.outcome() == expected
    assert tokens_of(cluster, first)["handed_over"] == 999
    settled(cluster)
    for name in ("prefill-0", "decode-0"):
        cluster.restart(name)
    longer = body | {"prompt": body["prompt"] + token_prompt(200, 901)}
    answer = ask(cluster.url, longer)
    assert answer.outcome() == ask(plain.url, longer).outcome()
    entry = record(cluster.url, answer)
    assert entry["outcome"] == "landed", entry
    assert [(part["tier"], part["tokens"]) for part in entry["prefill"]["from_cache"]] == [("host", 1000)]
    assert entry["decode"]["from_cache"] == [], "one rank cannot use what two have computed"
