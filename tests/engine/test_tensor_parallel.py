"""Instances of other tensor parallel sizes: each rank writes its heads where they belong, and the tokens are the same.

What is equal to what. The blocks that D decodes from are P's, bit for bit: a digest of every byte, rank by rank. P's
numbers themselves depend on P's size: two ranks add up partial sums in another order than one, which changes last bits.
So over `1 -> 2` greedy tokens equal those of a plain vLLM of either size except where two tokens are nearly tied, which
float32 makes rare enough to ask for equality here; over `2 -> 2` the sizes make no difference at all.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import requests

from cluster.launcher import Cluster
from tests.engine.client import Answer, ask_all, record
from tests.engine.clusters import CHUNKED, FLOAT32, options
from tests.engine.prompts import BLOCK, token_prompt
from tests.poll import until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

LENGTHS = (BLOCK + 1, 2 * BLOCK, 5 * BLOCK + 1, 1000)
NEW_TOKENS = 8


def ranks(count: int) -> tuple[str, ...]:
    """vLLM's arguments for an instance of so many ranks."""
    more = ("--tensor-parallel-size", str(count)) if count > 1 else ()
    return FLOAT32 + CHUNKED + more


def bodies(first_seed: int, lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, Any]]:
    prompts = [token_prompt(length, first_seed + length) for length in lengths]
    return [{"prompt": prompt, "max_tokens": NEW_TOKENS, "ignore_eos": True} for prompt in prompts]


def names_in_shared_memory() -> set[str]:
    """Of Python's and of vLLM's own segments."""
    return {path.name for kind in ("psm_*", "vllm_dist_*") for path in Path("/dev/shm").glob(kind)}


def check_landed(cluster: Cluster, answers: list[Answer], asked: list[dict[str, Any]], transport: str) -> None:
    """All but each prompt's last token was handed over, over this transport, and D has every byte that P sent."""
    for answer, body in zip(answers, asked, strict=True):
        entry = record(cluster.url, answer)
        assert (entry["outcome"], entry["path"]["why"]) == ("landed", "")
        assert entry["tokens"]["handed_over"] == len(body["prompt"]) - 1, entry
        assert entry["path"]["transport"] == transport, entry
        assert entry["decode"]["bytes"] == entry["prefill"]["bytes"] > 0, entry


def check_equal(cluster: Cluster, plain: Cluster, transport: str, first_seed: int) -> None:
    """The same tokens, and all of the KV came over this transport."""
    asked = bodies(first_seed)
    ours = ask_all(cluster.url, asked, 2)
    theirs = ask_all(plain.url, asked, 2)
    assert [answer.outcome() for answer in ours] == [answer.outcome() for answer in theirs]
    check_landed(cluster, ours, asked, transport)


def chosen(cluster: Cluster) -> dict[tuple[int, int], str]:
    """The transport of each pair of ranks, once all their paths are measured; empty before."""
    pairs = requests.get(f"{cluster.url}/status", timeout=10).json()["pairs"]
    if any(path["why"] == "not measured yet" for pair in pairs for path in pair["paths"]):
        return {}
    return {tuple(pair["ranks"]): pair["transport"] for pair in pairs}


@pytest.mark.host_memory
def test_one_rank_fills_two(start: Any, plain: Cluster) -> None:
    arguments = {"arguments_prefill": ranks(1), "arguments_decode": ranks(2)}
    cluster = start("1P1D", transport="shm", connector={"full_digest": True}, **arguments)
    check_equal(cluster, plain, "shm", 100_000)


@pytest.mark.host_memory
def test_two_ranks_fill_one_and_each_pair_takes_the_path_that_was_measured_fastest(start: Any, plain: Cluster) -> None:
    arguments = {"arguments_prefill": ranks(2), "arguments_decode": ranks(1)}
    slow = {"faulty": {"shm": {"delay_s": 0.5}}}
    cluster = start("1P1D", connector={"full_digest": True}, connector_prefill=slow, **arguments)
    until(lambda: chosen(cluster) == {(0, 0): "zmq", (1, 0): "zmq"}, 60.0, "both pairs of ranks choose zmq")
    lines = requests.get(f"{cluster.url}/metrics", timeout=10).text.splitlines()
    assert sum(line.startswith("baton_path_chosen{") and 'ranks="1-0"' in line for line in lines) == 2
    check_equal(cluster, plain, "zmq", 200_000)


@pytest.mark.parametrize("killed", [True, False])
def test_ranks_leave_nothing_in_shared_memory(zygote: Any, killed: bool) -> None:
    """vLLM's ranks speak through /dev/shm; those that are killed, or too slow to end, cannot unlink it."""
    before = names_in_shared_memory()
    with Cluster("0P1D", options(*ranks(2)), zygote=zygote) as cluster:
        ask_all(cluster.url, bodies(1, (BLOCK,)), 1)
        assert names_in_shared_memory() - before
        if killed:
            os.kill(cluster.instances[0].pid, signal.SIGKILL)
    until(lambda: not names_in_shared_memory() - before, what="its end")


@pytest.mark.full
@pytest.mark.parametrize(("prefill", "decode"), [(2, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize("transport", ["zmq", "shm"])
def test_equal_to_plain_vllm_of_the_decoding_size(
    start: Any, zygote: Any, prefill: int, decode: int, transport: str
) -> None:
    arguments = {"arguments_prefill": ranks(prefill), "arguments_decode": ranks(decode)}
    asked = bodies(300_000, (*LENGTHS, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 1, 3000)) * 2
    with Cluster("0P1D", options(arguments_decode=ranks(decode)), zygote=zygote) as plain:
        theirs = ask_all(plain.url, asked, 4)
    cluster = start("1P1D", transport=transport, connector={"full_digest": True}, **arguments)
    ours = ask_all(cluster.url, asked, 4)
    assert [answer.outcome() for answer in ours] == [answer.outcome() for answer in theirs]
    check_landed(cluster, ours[:4], asked[:4], transport)


@pytest.mark.full
@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_a_rank_of_the_prefill_instance_dies(start: Any, plain: Cluster, tmp_path: Path, transport: str) -> None:
    reached = tmp_path / "reached"
    fault = {"phase": "push", "layer": 2, "chunk": 1, "record": str(reached), "action": "kill"}
    arguments = {"arguments_prefill": ranks(2), "arguments_decode": ranks(2)}
    cluster = start("1P1D", transport=transport, connector_prefill={"fault": fault}, **arguments)
    [request] = bodies(400_000, (1000,))
    [answer] = ask_all(cluster.url, [request], 1)
    [expected] = ask_all(plain.url, [request], 1)
    assert answer.outcome() == expected.outcome()
    assert reached.exists()
    entry = record(cluster.url, answer)
    assert entry["outcome"] == "fell_back", entry
    assert entry["tokens"]["computed"] == 1000
