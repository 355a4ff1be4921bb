"""What the cache costs where it cannot help, counted and not timed: questions and copied bytes per request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cluster.launcher import Cluster
from kvcache.client import ask_figures
from kvcache.spec import CacheSpec
from tests.engine.client import ask_all, record
from tests.engine.clusters import CHUNKED
from tests.engine.prompts import BLOCK, token_prompt
from tests.poll import until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

NUM_REQUESTS = 8
NUM_TOKENS = 1000
BLOCKS_PER_PROMPT = -(-NUM_TOKENS // BLOCK)


def figures(cluster: Cluster) -> dict[str, float]:
    until(lambda: ask_figures(str(cluster.cache.socket))["reserved_bytes"] == 0, what="the last commit")
    return ask_figures(str(cluster.cache.socket))


@pytest.mark.parametrize("topology", ["0P1D", "1P1D"])
def test_without_reuse_each_block_is_copied_once_and_each_engine_asks_once(
    start: Callable[..., Cluster], topology: str
) -> None:
    """Then the same prompts again, all of which fit the engine: nothing is stored, and no full block is loaded."""
    cluster = start(topology, *CHUNKED, cache=CacheSpec.parse("256MiB"))
    bodies: list[dict[str, Any]] = [
        {"prompt": token_prompt(NUM_TOKENS, 1200 + n), "max_tokens": 4, "ignore_eos": True} for n in range(NUM_REQUESTS)
    ]
    before = figures(cluster)
    ask_all(cluster.url, bodies, 4)
    after = figures(cluster)
    num_engines = len(cluster.instances)
    asked = {name: after[name] - before[name] for name in ("questions", "committed_blocks", "found_blocks")}
    assert asked["questions"] <= NUM_REQUESTS * num_engines
    assert asked["committed_blocks"] == NUM_REQUESTS * BLOCKS_PER_PROMPT
    assert asked["found_blocks"] == 0

    again = ask_all(cluster.url, bodies, 4)
    once_more = figures(cluster)
    assert once_more["committed_blocks"] == after["committed_blocks"], "nothing is stored twice"
    for answer in again:
        tokens = record(cluster.url, answer)["tokens"]
        assert tokens["found_locally"] == NUM_TOKENS // BLOCK * BLOCK
        assert tokens["from_cache"] < BLOCK, "no more than the prompt's end"
        assert tokens["computed"] == 1
    assert once_more["questions"] - after["questions"] <= 2 * NUM_REQUESTS * num_engines, "one for the end"
