"""Two hosts' worth of engines, each with a cache server of its own: what one computed the other loads, tokens equal."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster.launcher import Cluster
from cluster.ports import free_ports
from kvcache.spec import CacheSpec
from tests.engine.client import ask, record
from tests.engine.clusters import CHUNKED
from tests.engine.prompts import BLOCK, token_prompt
from tests.engine.test_cache import completion, figures, settled
from tests.poll import until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def test_what_one_host_computed_another_loads_from_it_and_its_death_costs_nothing(
    start: Callable[..., Cluster], plain: Cluster
) -> None:
    (port,) = free_ports(1, "127.0.0.1")
    body = completion(1000, 900)
    longer = body | {"prompt": body["prompt"] + token_prompt(300, 901)}
    other = completion(700, 902)
    first = start("0P1D", *CHUNKED, cache=CacheSpec.parse(f"128MiB,listen=127.0.0.1:{port}"))
    for asked in (body, other):
        assert ask(first.url, asked).outcome() == ask(plain.url, asked).outcome()
    settled(first)
    num_blocks = 1000 // BLOCK + 700 // BLOCK
    second = start("0P1D", *CHUNKED, cache=CacheSpec.parse(f"128MiB,peer=127.0.0.1:{port}"))
    until(lambda: figures(second)["peer_blocks"] == num_blocks, what="what the peer has")

    answer = ask(second.url, longer)
    assert answer.outcome() == ask(plain.url, longer).outcome()
    entry = record(second.url, answer)
    parts = [(part["tier"], part["tokens"]) for part in entry["decode"]["from_cache"]]
    assert parts == [("peer", 1000 // BLOCK * BLOCK)], entry
    assert entry["tokens"]["from_cache"] == 1000 // BLOCK * BLOCK
    assert figures(first)["served_blocks"] == 1000 // BLOCK

    first.cache.kill_group()
    until(lambda: figures(second)["peer_connected"] == 0, what="the end of the connection")
    answer = ask(second.url, other)
    assert answer.outcome() == ask(plain.url, other).outcome()
    assert record(second.url, answer)["tokens"]["from_cache"] == 0
