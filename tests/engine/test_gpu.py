"""1P1D on a real GPU, or two. Never run yet: whoever has one runs `pytest -m gpu tests/engine/test_gpu.py`.

A GPU's float16 sums differ in their last bits between a prompt computed at once and one token at a time, so answers may
part where two tokens are nearly tied; the blocks themselves are compared bit for bit, by their digests.
"""

from __future__ import annotations

from typing import Any

import pytest

from cluster.launcher import Cluster
from cluster.options import ClusterOptions
from engine.build import Device, installed_build
from kvcache.spec import CacheSpec
from tests.engine.client import ask_all, record
from tests.engine.prompts import token_prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(installed_build().device is not Device.GPU, reason="this vLLM computes on the CPU"),
]

ARGUMENTS = ("--dtype", "float16", "--max-model-len", "4096", "--gpu-memory-utilization", "0.3")
LENGTHS = (33, 128, 700, 1300, 2000)


def cluster_of(topology: str, **more: Any) -> Cluster:
    return Cluster(topology, ClusterOptions(arguments_prefill=ARGUMENTS, arguments_decode=ARGUMENTS, **more))


def test_blocks_cross_from_gpu_to_gpu_and_to_the_cache_and_back() -> None:
    asked = [{"prompt": token_prompt(length, length), "max_tokens": 16, "ignore_eos": True} for length in LENGTHS]
    with cluster_of("0P1D") as plain:
        theirs = [answer.outcome() for answer in ask_all(plain.url, asked, 1)]
    with cluster_of("1P1D", transport="cuda_ipc", cache=CacheSpec.parse("256MiB")) as cluster:
        first = ask_all(cluster.url, asked, 1)
        entries = [record(cluster.url, answer) for answer in first]
        for name in ("prefill-0", "decode-0"):
            cluster.restart(name)
        again = ask_all(cluster.url, asked, 1)
        found = [record(cluster.url, answer)["tokens"] for answer in again]
    landed = [entry for entry in entries if entry["outcome"] == "landed"]
    assert len(landed) >= 3, entries
    assert all(entry["path"]["transport"] == "cuda_ipc" for entry in landed), entries
    assert all(each["from_cache"] >= each["prompt"] - 1 - 16 for each in found), found
    for ours in (first, again):
        equal = sum(answer.outcome() == expected for answer, expected in zip(ours, theirs, strict=True))
        assert equal >= len(LENGTHS) - 1, f"{equal} of {len(LENGTHS)} answers are plain vLLM's"
