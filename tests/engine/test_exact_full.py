"""The whole product of promise 1: length, endpoint, streaming, concurrency, chunking, transport, cache state."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from cluster.launcher import Cluster
from tests.engine.client import ask_all, record
from tests.engine.clusters import CHUNKED, WHOLE
from tests.engine.prompts import LENGTHS
from tests.engine.test_exact import chat, check_equal, completion

pytestmark = [pytest.mark.engine, pytest.mark.full, pytest.mark.timeout(1800)]

AXES = (["shm", "zmq"], ["chunked", "whole"], [1, 8], ["cold", "prefill", "decode"])
SEEDS = list(itertools.product(*AXES))


@pytest.mark.parametrize(("transport", "prefill", "concurrency", "warm"), SEEDS)
def test_product(
    shared_cluster: Any, plain: Cluster, transport: str, prefill: str, concurrency: int, warm: str
) -> None:
    pair: Cluster = shared_cluster("1P1D", *(CHUNKED if prefill == "chunked" else WHOLE), transport=transport)
    seed = 100_000 + 1000 * SEEDS.index((transport, prefill, concurrency, warm))
    asked = []
    for make in (completion, chat):
        for stream in (False, True):
            asked += [make(length, seed + 13 * index, stream=stream) for index, length in enumerate(LENGTHS)]
            seed += 1
    if warm != "cold":
        instance = pair.instances[0 if warm == "prefill" else 1]
        ask_all(instance.spec.url, [body | {"stream": False, "max_tokens": 1} for body in asked], concurrency)
    ours = ask_all(pair.url, asked, concurrency)
    check_equal(ask_all(plain.url, asked, concurrency), ours, asked)
    handed = sum((record(pair.url, answer)["tokens"]["handed_over"] or 0) > 0 for answer in ours)
    print(f"\n{transport} {prefill} x{concurrency} {warm}: {len(asked)} equal, {handed} handed over")
    assert handed > 0 or warm == "decode"
