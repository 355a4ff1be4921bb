"""The shared KV cache under real engines: what one computed another loads, and every token stays what it was."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from cluster.launcher import Cluster
from kvcache.client import ask_figures, fetch_arena
from kvcache.partial import MIN_TOKENS
from kvcache.spec import CacheSpec
from tests.engine.client import Answer, ask, ask_all, record
from tests.engine.clusters import CHUNKED, WHOLE
from tests.engine.prompts import BLOCK, LENGTHS, chat_messages, token_prompt
from tests.poll import until
from transport.mapping import Mapping

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

BIG = CacheSpec.parse("256MiB")


def completion(num_tokens: int, seed: int, **more: Any) -> dict[str, Any]:
    return {"prompt": token_prompt(num_tokens, seed), "max_tokens": 10, "ignore_eos": True} | more


def figures(cluster: Cluster) -> dict[str, float]:
    return ask_figures(str(cluster.cache.socket))


def settled(cluster: Cluster) -> None:
    """Every store that was begun is found from now on, and nothing is held."""
    until(lambda: figures(cluster)["reserved_bytes"] == 0, what="the last commit")


def tokens_of(cluster: Cluster, answer: Answer) -> dict[str, int]:
    """The record's tokens, which must add up."""
    tokens: dict[str, int] = record(cluster.url, answer)["tokens"]
    parts = ("handed_over", "found_locally", "from_cache", "computed")
    assert tokens["prompt"] == sum(tokens[part] for part in parts), tokens
    return tokens


def check_equal(ours: list[Answer], theirs: list[Answer]) -> None:
    for left, right in zip(ours, theirs, strict=True):
        assert left.outcome() == right.outcome()


@pytest.mark.parametrize(("transport", "prefill"), [("shm", CHUNKED), ("zmq", WHOLE)])
def test_every_length_is_exact_cold_after_a_restart_of_each_engine_and_of_the_cache_server(
    start: Callable[..., Cluster], plain: Cluster, transport: str, prefill: tuple[str, ...]
) -> None:
    cluster = start("1P1D", *prefill, cache=BIG, transport=transport)
    asked = [completion(length, 300 + index, stream=index % 2 == 0) for index, length in enumerate(LENGTHS)]
    asked.append({"messages": chat_messages(500, 77), "max_completion_tokens": 10, "ignore_eos": True})
    theirs = ask_all(plain.url, asked, 4)
    check_equal(ask_all(cluster.url, asked, 4), theirs)
    settled(cluster)

    cluster.restart("decode-0")
    again = ask_all(cluster.url, asked, 4)
    check_equal(again, theirs)
    for body, answer in zip(asked, again, strict=True):
        tokens, num_tokens = tokens_of(cluster, answer), len(body.get("prompt", ()))
        if num_tokens > BLOCK:  # a shorter prompt may be answered before anybody stored it
            end = num_tokens % BLOCK
            kept = num_tokens if end >= MIN_TOKENS else num_tokens - end
            assert tokens["from_cache"] + tokens["found_locally"] >= min(kept, num_tokens - 1), (num_tokens, tokens)
        assert tokens["computed"] <= BLOCK

    for member in ("prefill-0", "decode-0"):
        cluster.restart(member)
    cluster.cache.kill_group()
    until(lambda: cluster.cache.exit_code() is not None, what="the cache server's end")
    check_equal(ask_all(cluster.url, asked[:4], 4), theirs[:4])
    cluster.cache.start()
    until(cluster.cache.is_ready, what="the cache server")
    assert figures(cluster)["taken_over_blocks"] > 0

    def hit() -> bool:
        answer = ask(cluster.url, asked[-2])
        assert answer.outcome() == theirs[-2].outcome()
        return tokens_of(cluster, answer)["from_cache"] + tokens_of(cluster, answer)["found_locally"] > 0

    until(hit, what="a hit on what the dead server's engines had stored")


def test_all_instances_share_what_one_computed_and_its_death_costs_nothing(
    start: Callable[..., Cluster], plain: Cluster
) -> None:
    cluster = start("2P1D", *CHUNKED, cache=BIG)
    body = completion(1000, 400)
    expected = ask(plain.url, body).outcome()
    first = ask(cluster.url, body)
    assert first.outcome() == expected
    computed_by = record(cluster.url, first)["path"]["prefill"]
    settled(cluster)
    stored = figures(cluster)["committed_blocks"]
    assert stored == 1000 // BLOCK + 1, "each block once, although two instances had it; and the prompt's end"
    cluster.restart("decode-0")
    cluster.instance(computed_by).kill_group()

    longer = body | {"prompt": body["prompt"] + token_prompt(300, 401)}
    answer = ask(cluster.url, longer)
    assert answer.outcome() == ask(plain.url, longer).outcome()
    tokens = tokens_of(cluster, answer)
    assert tokens["from_cache"] == 1000 // BLOCK * BLOCK, "whole blocks from the cache, from P only the rest"
    again = ask(cluster.url, body)
    assert again.outcome() == expected


def test_the_prefill_instance_computes_only_what_no_tier_has(start: Callable[..., Cluster], plain: Cluster) -> None:
    cluster = start("1P1D", *CHUNKED, cache=BIG)
    body = completion(1000, 410)
    ask(cluster.url, body)
    settled(cluster)
    for member in ("prefill-0", "decode-0"):
        cluster.restart(member)
    longer = body | {"prompt": body["prompt"] + token_prompt(700, 411)}
    answer = ask(cluster.url, longer)
    assert answer.outcome() == ask(plain.url, longer).outcome()
    entry = record(cluster.url, answer)
    cached = 1000 // BLOCK * BLOCK
    assert entry["tokens"]["from_cache"] == cached
    assert entry["tokens"]["handed_over"] == 1700 - 1 - cached
    assert [part["tokens"] for part in entry["prefill"]["from_cache"]] == [1000], "its end in the middle of a block too"
    assert entry["decode"]["from_cache"][0]["tier"] == "host"


def test_a_load_that_ends_after_the_hand_off_overwrites_nothing_of_it(
    start: Callable[..., Cluster], plain: Cluster, tmp_path: Path
) -> None:
    """The cache has the prompt to the middle of a block, the prefill instance writes the rest of that block."""
    stopped, landed = tmp_path / "stopped", tmp_path / "landed"
    cluster = start(
        "1P1D",
        *CHUNKED,
        cache=BIG,
        connector_decode={"fault": {"phase": "load", "record": str(stopped), "action": "stop"}},
        connector_prefill={"fault": {"phase": "landed", "record": str(landed), "action": "note", "after": 2}},
    )
    body = completion(1000, 415)
    ask(cluster.url, body)
    settled(cluster)
    cluster.restart("decode-0")
    ask(cluster.url, completion(300, 417))  # connects: a stopped worker could not
    longer = body | {"prompt": body["prompt"] + token_prompt(700, 416), "logprobs": 1}
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask, cluster.url, longer)
        until(stopped.exists, what="the load")
        until(landed.exists, what="the hand-off's last write")
        os.kill(json.loads(stopped.read_text())["pid"], signal.SIGCONT)
        answer = asking.result()
    expected = ask(plain.url, longer)
    assert answer.logprobs == pytest.approx(expected.logprobs, abs=1e-3), "a few tokens may be lost without a trace"
    assert answer.outcome() == expected.outcome()
    entry = record(cluster.url, answer)
    assert entry["outcome"] == "landed", entry
    assert entry["tokens"]["from_cache"] == 1000 // BLOCK * BLOCK, "whole blocks: the next is the prefill instance's"


def test_a_conversation_finds_the_answer_that_the_decode_instance_gave(
    start: Callable[..., Cluster], plain: Cluster
) -> None:
    """Also with one instance and no hand-off; and after its restart."""
    cluster = start("0P1D", *CHUNKED, cache=BIG)
    prompt = token_prompt(300, 420)
    body = {"prompt": prompt, "max_tokens": 300, "ignore_eos": True}
    answer = ask(cluster.url, body)
    expected = ask(plain.url, body)
    assert answer.outcome() == expected.outcome()
    settled(cluster)
    cluster.restart("decode-0")
    turn = {"prompt": prompt + answer.tokens[0] + token_prompt(50, 421), "max_tokens": 10, "ignore_eos": True}
    second = ask(cluster.url, turn)
    assert second.outcome() == ask(plain.url, turn).outcome()
    assert tokens_of(cluster, second)["from_cache"] >= (300 + 299) // BLOCK * BLOCK - BLOCK


def test_tenants_share_nothing(start: Callable[..., Cluster]) -> None:
    cluster = start("0P1D", *CHUNKED, cache=BIG)
    body = completion(600, 430)
    for salt, hit in (("alice", False), ("bob", False), ("alice", True)):
        answer = ask(cluster.url, body | {"cache_salt": salt})
        assert (tokens_of(cluster, answer)["from_cache"] > 0) == hit, salt
        settled(cluster)
        cluster.restart("decode-0")


def flip(cluster: Cluster, at: int, num_bytes: int = 1) -> None:
    """One bit of so many bytes of the arena: the last bits of floats, or among many bytes the first ones too."""
    fd, size, _ = fetch_arena(str(cluster.cache.socket), "test")
    arena = Mapping(fd, size)
    os.close(fd)
    for byte in range(at, at + num_bytes):
        arena._mmap[byte] ^= 1
    arena.close()


@pytest.mark.parametrize("topology", ["0P1D", "1P1D"])
def test_a_flipped_bit_in_the_arena_is_computed_anew_and_counted(
    start: Callable[..., Cluster], plain: Cluster, topology: str
) -> None:
    """Also where the rest of the prompt comes from a prefill instance, which meets the same block."""
    cluster = start(topology, *CHUNKED, cache=BIG)
    body = completion(600, 440)
    ask(cluster.url, body)
    settled(cluster)
    for instance in cluster.instances:
        cluster.restart(instance.name)
    flip(cluster, 1000)
    longer = body | {"prompt": body["prompt"] + token_prompt(400, 441)}
    answer = ask(cluster.url, longer)
    assert answer.outcome() == ask(plain.url, longer).outcome()
    entry = record(cluster.url, answer)
    tokens = tokens_of(cluster, answer)
    assert (entry["outcome"], tokens["prompt"], tokens["computed"]) == ("fell_back", 1000, 1000), entry
    assert "differs" in entry["decode"]["why"]
    assert figures(cluster)["quarantined_blocks"] == 1


@pytest.mark.parametrize(("phase", "role"), [("store", "prefill"), ("load", "decode")])
def test_an_engine_killed_in_the_middle_of_a_copy(
    start: Callable[..., Cluster], plain: Cluster, tmp_path: Path, phase: str, role: str
) -> None:
    """The request completes, what was not complete is never found, and what was held comes back."""
    reached = tmp_path / "reached"
    fault = {"phase": phase, "layer": 2 if phase == "store" else -1, "record": str(reached), "action": "kill"}
    body = completion(1000, 450)
    expected = ask(plain.url, body).outcome()
    cluster = start("1P1D", *CHUNKED, cache=BIG, **{f"connector_{role}": {"fault": fault}})
    assert ask(cluster.url, body).outcome() == expected
    if phase == "load":
        settled(cluster)
        assert not reached.exists(), "nothing was there to load"
        cluster.restart("decode-0")
        assert ask(cluster.url, body).outcome() == expected
    assert json.loads(reached.read_text())["phase"] == phase
    until(lambda: figures(cluster)["reserved_bytes"] + figures(cluster)["cooling_bytes"] == 0, what="the reservations")
    assert ask(cluster.url, body).outcome() == expected


def test_a_tiny_arena_under_load_with_clients_that_leave(start: Callable[..., Cluster], plain: Cluster) -> None:
    """Sixteen at a time, shared prefixes, a third cancelled, blocks evicted all the while: every answer is equal."""
    cluster = start("1P1D", *CHUNKED, cache=CacheSpec.parse("8MiB"))
    prefixes = [token_prompt(400, 460 + index) for index in range(4)]
    asked = [
        {"prompt": prefixes[i % 4] + token_prompt(40 + 37 * i % 300, 470 + i), "max_tokens": 8, "ignore_eos": True}
        for i in range(36)
    ]

    def leave(body: dict[str, Any]) -> None:
        try:
            requests.post(cluster.url + "/v1/completions", json={"model": "baton-demo", **body}, timeout=0.3)
        except requests.RequestException:
            return

    with ThreadPoolExecutor(4) as pool:
        leaving = [pool.submit(leave, body | {"max_tokens": 50}) for body in asked[::3]]
        ours = ask_all(cluster.url, asked, 16)
        for task in leaving:
            task.result()
    check_equal(ours, ask_all(plain.url, asked, 8))
    assert figures(cluster)["evicted_blocks"] > 0
    settled(cluster)
    check_equal(ask_all(cluster.url, asked[:8], 8), ask_all(plain.url, asked[:8], 8))


def test_a_hanging_cache_server_delays_nobody_for_long(start: Callable[..., Cluster], plain: Cluster) -> None:
    cluster = start("1P1D", *CHUNKED, cache=BIG)
    bodies = [completion(700, 480 + index) for index in range(6)]
    theirs = ask_all(plain.url, bodies, 1)
    cluster.cache.kill(signal.SIGSTOP)
    try:
        check_equal(ask_all(cluster.url, bodies, 3), theirs)
    finally:
        cluster.cache.kill(signal.SIGCONT)


@pytest.mark.parametrize("codec", ["", ",codec=zstd"])
def test_everything_restarted_the_disk_gives_it_back(
    start: Callable[..., Cluster], plain: Cluster, tmp_path: Path, codec: str
) -> None:
    """Another launcher, other engines, an empty arena: the tokens are equal and come from the disk."""
    spec = CacheSpec.parse(f"64MiB,disk={tmp_path}/kv:256MiB{codec}")
    body = completion(1000, 490)
    expected = ask(plain.url, body).outcome()
    first = start("0P1D", *CHUNKED, cache=spec)
    assert ask(first.url, body).outcome() == expected
    until(lambda: figures(first)["disk_blocks"] == 1000 // BLOCK + 1, what="the blocks on the disk")
    first.stop()
    second = start("0P1D", *CHUNKED, cache=spec)
    answer = ask(second.url, body)
    assert answer.outcome() == expected
    parts = record(second.url, answer)["decode"]["from_cache"]
    assert [(part["tier"], part["tokens"]) for part in parts] == [("disk", 999)], (
        "all but the token that the engine must compute"
    )


def test_a_lossy_disk_is_named_in_the_record_and_takes_the_share_it_is_there_for(
    start: Callable[..., Cluster], tmp_path: Path
) -> None:
    """The engine has named the shape of its float32 blocks; the answers may differ from the exact ones."""
    spec = CacheSpec.parse(f"64MiB,disk={tmp_path}/kv:256MiB,codec=int8")
    body = completion(1000, 491)
    first = start("0P1D", *CHUNKED, cache=spec)
    ask(first.url, body)
    until(lambda: figures(first)["disk-int8_blocks"] == 1000 // BLOCK + 1, what="the blocks on the disk")
    share = figures(first)["disk-int8_encoded_bytes"] / figures(first)["disk-int8_put_bytes"]
    assert share == pytest.approx(1 / 4, abs=0.01)
    first.stop()
    second = start("0P1D", *CHUNKED, cache=spec)
    answer = ask(second.url, body)
    assert len(answer.outcome()) > 0
    parts = record(second.url, answer)["decode"]["from_cache"]
    assert [(part["tier"], part["tokens"]) for part in parts] == [("disk-int8", 999)]
    assert figures(second)["disk-int8_corrupt"] == 0
