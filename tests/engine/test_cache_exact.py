"""The same tokens as plain vLLM for chats, shared documents, summaries and code, wherever their KV comes from.

The rows of one table: cold, warm, other engines, another cache server on the same arena, and everything new but the
disk or Redis; then all of it at once in too little memory, with clients that leave and requests that are preempted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from cluster.launcher import Cluster
from cluster.ports import free_ports
from kvcache.client import ask_figures
from kvcache.spec import CacheSpec
from tests.engine.client import Answer, ask, ask_all, record
from tests.engine.clusters import CHUNKED
from tests.engine.prompts import BLOCK, token_prompt
from tests.engine.workloads import Body, all_kinds
from tests.kvcache.test_redis import BINARY, RedisServer
from tests.poll import until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def figures(cluster: Cluster) -> dict[str, float]:
    return ask_figures(str(cluster.cache.socket))


def settle(cluster: Cluster) -> None:
    until(lambda: figures(cluster)["reserved_bytes"] == 0, what="the last commit")


def equal(ours: list[Answer], theirs: list[Answer]) -> None:
    for number, (left, right) in enumerate(zip(ours, theirs, strict=True)):
        assert left.outcome() == right.outcome(), f"request {number}"


def tiers_of(cluster: Cluster, answers: list[Answer]) -> dict[str, int]:
    """Tokens that these requests got, by tier."""
    result: dict[str, int] = {}
    for answer in answers:
        entry = record(cluster.url, answer)
        for half in ("prefill", "decode"):
            for part in (entry[half] or {}).get("from_cache", ()):
                result[part["tier"]] = result.get(part["tier"], 0) + part["tokens"]
    return result


@pytest.fixture(scope="module")
def asked(plain: Cluster) -> tuple[list[Body], list[Answer]]:
    """All kinds of work, and plain vLLM's answers."""
    bodies = all_kinds(900)
    return bodies, [ask(plain.url, body) for body in bodies]


@pytest.mark.parametrize("topology", ["0P1D", "1P1D"])
def test_cold_warm_other_engines_and_another_server(
    start: Callable[..., Cluster], asked: tuple[list[Body], list[Answer]], topology: str
) -> None:
    bodies, theirs = asked
    cluster = start(topology, *CHUNKED, cache=CacheSpec.parse("256MiB"))
    equal([ask(cluster.url, body) for body in bodies], theirs)
    equal(ask_all(cluster.url, bodies, 4), theirs)
    settle(cluster)
    for instance in cluster.instances:
        cluster.restart(instance.name)
    again = ask_all(cluster.url, bodies, 4)
    equal(again, theirs)
    assert tiers_of(cluster, again)["host"] > 0
    cluster.cache.kill_group()
    until(lambda: cluster.cache.exit_code() is not None, what="the cache server's end")
    cluster.cache.start()
    until(cluster.cache.is_ready, what="the cache server")
    for instance in cluster.instances:
        cluster.restart(instance.name)
    again = [ask(cluster.url, body) for body in bodies]
    equal(again, theirs)
    assert tiers_of(cluster, again)["host"] > 0


@contextmanager
def lower_tier(kind: str, folder: Path) -> Iterator[str]:
    """The word for `--cache` of one that outlives every cluster."""
    if kind == "disk":
        yield f"disk={folder}/kv:512MiB"
        return
    if BINARY is None:
        pytest.skip("no redis-server: apt-get install redis-server")
    server = RedisServer(folder)
    server.start()
    try:
        yield server.url
    finally:
        server.close()


@pytest.mark.parametrize("kind", ["disk", "redis"])
def test_everything_new_but_one_lower_tier(
    start: Callable[..., Cluster], asked: tuple[list[Body], list[Answer]], tmp_path: Path, kind: str
) -> None:
    """Another launcher, other engines, an empty arena."""
    bodies, theirs = asked
    with lower_tier(kind, tmp_path) as word:
        spec = CacheSpec.parse(f"256MiB,{word}")
        first = start("0P1D", *CHUNKED, cache=spec)
        equal(ask_all(first.url, bodies, 4), theirs)
        settle(first)
        until(lambda: figures(first)[f"{kind}_puts"] >= figures(first)["committed_blocks"], what="the lower tier")
        first.stop()
        second = start("0P1D", *CHUNKED, cache=spec)
        again = [ask(second.url, body) for body in bodies]
        equal(again, theirs)
        assert tiers_of(second, again)[kind] > 0
        second.stop()


def leave(cluster: Cluster, body: Body) -> None:
    """A client that goes away in the middle of its answer."""
    try:
        requests.post(cluster.url + "/v1/completions", json={"model": "baton-demo", **body}, timeout=0.3)
    except requests.RequestException:
        return


def preemptions(cluster: Cluster) -> float:
    text = requests.get(cluster.instances[-1].url + "/metrics", timeout=10).text
    lines = [line for line in text.splitlines() if line.startswith("vllm:num_preemptions_total")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


PREFIXES = [token_prompt(400, 1100 + index) for index in range(4)]


@contextmanager
def tier_below(kind: str, folder: Path, start: Callable[..., Cluster]) -> Iterator[str]:
    """As `lower_tier`; a peer's prefixes are there already."""
    if kind != "peer":
        with lower_tier(kind, folder) as word:
            yield word
        return
    (port,) = free_ports(1, "127.0.0.1")
    other = start("0P1D", *CHUNKED, cache=CacheSpec.parse(f"64MiB,listen=127.0.0.1:{port}"))
    ask_all(other.url, [{"prompt": prefix, "max_tokens": 1} for prefix in PREFIXES], 4)
    settle(other)
    yield f"peer=127.0.0.1:{port}"


@pytest.mark.parametrize("topology", ["0P1D", "1P1D"])
def test_too_little_memory_everywhere(start: Callable[..., Cluster], plain: Cluster, topology: str) -> None:
    check_too_little_memory(start, plain, topology, "8MiB")


@pytest.mark.parametrize("kind", ["disk", "redis", "peer"])
def test_too_little_memory_above_a_tier_that_has_it(
    start: Callable[..., Cluster], plain: Cluster, tmp_path: Path, kind: str
) -> None:
    with tier_below(kind, tmp_path, start) as word:
        cluster = check_too_little_memory(start, plain, "0P1D", f"8MiB,{word}")
        assert figures(cluster)[f"{kind}_hits"] > 0, "blocks came up while others were evicted"
        cluster.stop()


def check_too_little_memory(start: Callable[..., Cluster], plain: Cluster, topology: str, cache: str) -> Cluster:
    """Sixteen at a time, an arena and an engine's KV cache that hold a few prompts each, clients that leave:
    blocks are evicted and requests preempted all the while, and nothing stays held."""
    small = ("--kv-cache-memory-bytes", str(24 << 20))  # 48 blocks
    cluster = start(topology, *CHUNKED, *small, cache=CacheSpec.parse(cache))
    bodies: list[dict[str, Any]] = [
        {"prompt": PREFIXES[i % 4] + token_prompt(30 + 41 * i % 200, 1120 + i), "max_tokens": 140, "ignore_eos": True}
        for i in range(24)
    ]
    with ThreadPoolExecutor(4) as pool:
        leaving = [pool.submit(leave, cluster, body) for body in bodies[::4]]
        ours = ask_all(cluster.url, bodies, 16)
        for task in leaving:
            task.result()
    equal(ours, ask_all(plain.url, bodies, 8))
    assert preemptions(cluster) > 0, "the engine's memory was not short"
    assert figures(cluster)["evicted_blocks"] > 0, "the arena was not short"
    settle(cluster)
    until(lambda: figures(cluster)["cooling_bytes"] == 0, what="the last place")
    assert figures(cluster)["blocks"] * BLOCK > 0
    return cluster
