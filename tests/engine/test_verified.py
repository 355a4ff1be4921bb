"""Promise 2: a request says how many of its tokens were handed over, found and computed; nothing is taken on trust."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.launcher import Cluster
from tests.engine.client import ask, metric, record
from tests.engine.clusters import WHOLE
from tests.engine.prompts import BLOCK, ROOT, token_prompt

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

LAYERS = json.loads((ROOT / "cluster" / "demo_model" / "config.json").read_text())["num_hidden_layers"]


@pytest.mark.host_memory
@pytest.mark.parametrize("transport", ["shm", "zmq"])
@pytest.mark.parametrize("num_tokens", [BLOCK + 1, 5 * BLOCK, 1000])
def test_every_block_is_written_and_only_the_last_token_is_computed(
    shared_cluster: Any, plain: Cluster, transport: str, num_tokens: int
) -> None:
    """D's blocks are filled with NaN before Accept; afterwards none of the pattern is left in any layer."""
    cluster: Cluster = shared_cluster("1P1D", *WHOLE, transport=transport, connector={"audit": True})
    request = {"prompt": token_prompt(num_tokens, 40_000), "max_tokens": 8, "ignore_eos": True}
    before = metric(cluster.url, "baton_tokens_total")
    answer = ask(cluster.url, request)
    assert answer.outcome() == ask(plain.url, request).outcome()
    entry = record(cluster.url, answer)
    num_blocks = -(-(num_tokens - 1) // BLOCK)
    found = entry["tokens"]["found_locally"]
    assert entry["tokens"] == {
        "prompt": num_tokens,
        "handed_over": num_tokens - 1 - found,
        "found_locally": found,
        "from_cache": 0,
        "computed": 1,
    }
    assert entry["decode"]["audited_pairs"] == (num_blocks - found // BLOCK) * LAYERS
    assert entry["decode"]["unwritten_pairs"] == 0
    assert metric(cluster.url, "baton_tokens_total") == before + num_tokens


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_the_push_overlaps_the_forward_pass(shared_cluster: Any, transport: str) -> None:
    """Of a one-chunk prompt, all but the last layer's bytes left before the last layer was computed."""
    cluster: Cluster = shared_cluster("1P1D", *WHOLE, transport=transport, connector={"audit": True})
    answer = ask(cluster.url, {"prompt": token_prompt(2000, 41_000), "max_tokens": 2})
    entry = record(cluster.url, answer)
    assert entry["prefill"]["chunks"] == 1
    assert entry["bytes"] > 0
    assert entry["prefill"]["bytes_before_last_layer"] == entry["bytes"] * (LAYERS - 1) / LAYERS


def test_a_broken_transfer_is_noticed_although_the_text_is_right(shared_cluster: Any, plain: Cluster) -> None:
    """The first hand-off is broken on purpose: the answer is the same, and record and metrics tell the difference."""
    cluster: Cluster = shared_cluster(
        "1P1D", *WHOLE, transport="zmq", connector_prefill={"faulty": {"truncate_write": 2}}
    )
    request = {"prompt": token_prompt(700, 42_000), "max_tokens": 8, "ignore_eos": True}
    answer = ask(cluster.url, request)
    assert answer.outcome() == ask(plain.url, request).outcome()
    entry = record(cluster.url, answer)
    assert entry["tokens"]["handed_over"] == 0
    assert entry["tokens"]["computed"] == 700
    assert metric(cluster.url, "baton_fallbacks_total") == 1
