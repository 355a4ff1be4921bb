"""Which path a hand-off takes in a running cluster: the fastest measured, and the next best when one fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import requests

from cluster.launcher import Cluster
from tests.engine.client import ask, record
from tests.engine.clusters import CHUNKED
from tests.engine.prompts import token_prompt
from tests.poll import until

pytestmark = [pytest.mark.engine, pytest.mark.host_memory, pytest.mark.timeout(300)]

NUM_TOKENS = 1300


def body(seed: int) -> dict[str, Any]:
    return {"prompt": token_prompt(NUM_TOKENS, seed), "max_tokens": 8, "ignore_eos": True}


def paths(cluster: Cluster) -> dict[str, Any]:
    """By transport, once they are measured; empty before."""
    pairs = requests.get(f"{cluster.url}/status", timeout=10).json()["pairs"]
    found = {path["transport"]: path for pair in pairs for path in pair["paths"]}
    return {} if any(path["why"] == "not measured yet" for path in found.values()) else found


def chosen(cluster: Cluster) -> dict[str, float]:
    """By transport, as the metrics say it."""
    lines = requests.get(f"{cluster.url}/metrics", timeout=10).text.splitlines()
    found = [line for line in lines if line.startswith("baton_path_chosen{")]
    return {name: float(line.rsplit(" ", 1)[1]) for line in found for name in ("shm", "zmq") if f'"{name}"' in line}


def log(cluster: Cluster) -> str:
    return cluster.instance("prefill-0").log.read_text()


def test_a_slow_shm_loses_to_zmq(start: Callable[..., Cluster], plain: Cluster) -> None:
    """Before the first request: instances are measured when they join."""
    cluster = start("1P1D", *CHUNKED, connector_prefill={"faulty": {"shm": {"delay_s": 0.5}}})
    measured = until(lambda: paths(cluster), 30.0, "both paths to be measured")
    assert (measured["zmq"]["state"], measured["shm"]["state"]) == ("chosen", "standby"), measured
    assert measured["zmq"]["write_gb_per_s"] > measured["shm"]["write_gb_per_s"]
    assert chosen(cluster) == {"shm": 0.0, "zmq": 1.0}
    assert "KV to decode-0 goes by zmq" in log(cluster)
    answer = ask(cluster.url, body(61_000))
    assert answer.outcome() == ask(plain.url, body(61_000)).outcome()
    entry = record(cluster.url, answer)
    assert (entry["outcome"], entry["path"]["transport"]) == ("landed", "zmq"), entry


def test_a_path_that_fails_in_mid_push_costs_no_request(start: Callable[..., Cluster], plain: Cluster) -> None:
    """shm breaks after five writes: this hand-off goes again over zmq, and the next one too."""
    cluster = start("1P1D", *CHUNKED, connector_prefill={"faulty": {"shm": {"disconnect_after": 5}}})
    measured = until(lambda: paths(cluster), 30.0, "both paths to be measured")
    assert measured["shm"]["state"] == "chosen", measured
    for seed in (62_000, 62_001):
        answer = ask(cluster.url, body(seed))
        assert answer.outcome() == ask(plain.url, body(seed)).outcome()
        entry = record(cluster.url, answer)
        assert (entry["outcome"], entry["path"]["transport"]) == ("landed", "zmq"), entry
        assert entry["tokens"]["handed_over"] == NUM_TOKENS - 1, "nothing was computed again"
        why = "shm failed: disconnected by a fault" if seed == 62_000 else ""
        assert (entry["prefill"]["rerouted"], entry["prefill"]["why"]) == (float(bool(why)), why)
    failed = until(lambda: paths(cluster).get("shm", {}).get("state") == "failed" and paths(cluster)["shm"], 10.0)
    assert (failed["failures"], failed["why"]) == (1, "disconnected by a fault")
    assert chosen(cluster) == {"shm": 0.0, "zmq": 1.0}
    assert "shm has failed: disconnected by a fault" in log(cluster)
