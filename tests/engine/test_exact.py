"""Promise 1: greedy tokens through 1P1D equal those of one plain vLLM, whatever the path.

CI runs a covering set in which every value of each axis occurs: prompt lengths around block borders, chat and
completions, streamed and not, concurrency 1 and 8, chunked prefill on and off, shm and zmq, warm and cold prefix caches
on either side. `--full` runs the product.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from cluster.launcher import Cluster
from tests.engine.client import Answer, ask, ask_all, record
from tests.engine.clusters import CHUNKED, WHOLE
from tests.engine.prompts import BLOCK, LENGTHS, chat_messages, token_prompt
from tests.poll import until
from transport.schemes import unavailable

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

NEW_TOKENS = 12


def completion(num_tokens: int, seed: int, *, stream: bool) -> dict[str, Any]:
    return {
        "prompt": token_prompt(num_tokens, seed),
        "max_tokens": NEW_TOKENS,
        "stream": stream,
        "ignore_eos": True,
    }


def chat(num_tokens: int, seed: int, *, stream: bool) -> dict[str, Any]:
    return {
        "messages": chat_messages(num_tokens, seed),
        "max_completion_tokens": NEW_TOKENS,
        "stream": stream,
        "ignore_eos": True,
    }


def bodies(first_seed: int) -> list[dict[str, Any]]:
    """44 requests: each length by both endpoints, half of them streamed, and some lengths again the other way."""
    seeds = itertools.count(first_seed)
    result = []
    for index, length in enumerate(LENGTHS):
        result.append(completion(length, next(seeds), stream=index % 2 == 0))
        result.append(chat(length, next(seeds), stream=index % 2 == 1))
    for index, length in enumerate(LENGTHS[:-1]):
        make = (completion, chat)[index % 2]
        result.append(make(length, next(seeds), stream=index % 4 < 2))
    for index, length in enumerate(LENGTHS[:9]):
        result.append((chat, completion)[index % 2](length, next(seeds), stream=index % 3 == 0))
    return result


def check_equal(plain: list[Answer], pair: list[Answer], asked: list[dict[str, Any]]) -> None:
    for ours, theirs, body in zip(pair, plain, asked, strict=True):
        size = len(body.get("prompt", "")) or "chat"
        assert ours.outcome() == theirs.outcome(), f"prompt of {size}: {ours.outcome()} != {theirs.outcome()}"


def check_handed_over(pair: Cluster, answers: list[Answer], transport: str) -> int:
    """Every record is complete and consistent; returns how many requests were handed over."""
    handed = 0
    for answer in answers:
        entry = record(pair.url, answer)
        tokens = entry["tokens"]
        assert tokens["prompt"] == tokens["handed_over"] + tokens["found_locally"] + tokens["computed"], entry
        if tokens["handed_over"]:
            handed += 1
            assert tokens["computed"] == 1, entry
            assert entry["path"]["transport"] == transport, entry
    return handed


def over_nixl() -> Any:
    reason = unavailable("nixl")
    return pytest.param("nixl-chunked", marks=[pytest.mark.full, pytest.mark.skipif(bool(reason), reason=reason)])


@pytest.fixture(scope="module", params=["shm-chunked", "zmq-whole", over_nixl()])
def pair(request: pytest.FixtureRequest, shared_cluster: Any) -> Cluster:
    scheme, prefill = request.param.split("-")
    cluster: Cluster = shared_cluster("1P1D", *(CHUNKED if prefill == "chunked" else WHOLE), transport=scheme)
    return cluster


def transport_of(pair: Cluster) -> str:
    return pair.instances[0].spec.transport


def test_cold_caches_one_at_a_time(pair: Cluster, plain: Cluster) -> None:
    asked = bodies(0 if transport_of(pair) == "shm" else 5000)
    ours = ask_all(pair.url, asked, 1)
    check_equal(ask_all(plain.url, asked, 1), ours, asked)
    short = sum(1 for body in asked if len(body.get("prompt", [])) in range(1, BLOCK + 1))
    assert check_handed_over(pair, ours, transport_of(pair)) >= len(asked) - short - 8


def test_eight_at_a_time_then_the_same_again_with_warm_caches(pair: Cluster, plain: Cluster) -> None:
    asked = bodies(10_000 if transport_of(pair) == "shm" else 15_000)
    theirs = ask_all(plain.url, asked, 8)
    cold = ask_all(pair.url, asked, 8)
    check_equal(theirs, cold, asked)
    assert check_handed_over(pair, cold, transport_of(pair)) > len(asked) // 2
    warm = ask_all(pair.url, asked, 8)
    check_equal(theirs, warm, asked)
    found = [record(pair.url, answer)["tokens"]["found_locally"] for answer in warm]
    assert sum(found) > 0, "the second time D finds prefixes in its own cache"


@pytest.mark.host_memory
def test_large_copies_are_compiled_and_shared_among_threads_and_tokens_stay_equal(
    shared_cluster: Any, plain: Cluster
) -> None:
    """Behind a KV cache that makes it worth it, and layers of half a megabyte and more."""
    pair = shared_cluster("1P1D", *WHOLE, "--kv-cache-memory-bytes", str(512 << 20), transport="shm")
    sender = pair.instances[0]

    def has_compiler() -> bool:
        return any("llvmlite" in Path(f"/proc/{pid}/maps").read_text() for pid in sender.pids())

    until(has_compiler, what="the sender's worker compiles its copies")
    asked = [completion(length, 30_000 + length, stream=False) for length in (1000, 2 * BLOCK, 2049, 3000, 4000)]
    ours = ask_all(pair.url, asked, 3)
    check_equal(ask_all(plain.url, asked, 3), ours, asked)
    assert check_handed_over(pair, ours, "shm") == len(asked)


@pytest.mark.parametrize("warm", ["prefill", "decode", "half"])
def test_one_side_warm(pair: Cluster, plain: Cluster, warm: str) -> None:
    """The prompt, or half of it, is in one side's prefix cache before the pair sees it."""
    first = {"prefill": 20_000, "decode": 21_000, "half": 22_000}[warm]
    asked = [completion(length, first + length, stream=False) for length in (2 * BLOCK + 1, 5 * BLOCK, 1000)]
    instance = pair.instances[0] if warm == "prefill" else pair.instances[1]
    for body in asked:
        part = body["prompt"] if warm != "half" else body["prompt"][: len(body["prompt"]) // 2]
        ask(instance.spec.url, body | {"prompt": part, "max_tokens": 1})
    ours = ask_all(pair.url, asked, 1)
    check_equal(ask_all(plain.url, asked, 1), ours, asked)
    for answer, body in zip(ours, asked, strict=True):
        tokens = record(pair.url, answer)["tokens"]
        if warm == "prefill":
            assert tokens["handed_over"] == len(body["prompt"]) - 1
        else:
            assert tokens["found_locally"] >= len(body["prompt"]) // 2 // BLOCK * BLOCK
            assert tokens["computed"] <= BLOCK
