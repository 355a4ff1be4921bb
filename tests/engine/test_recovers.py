"""Promise 3: whatever happens to P or to the bytes, the request completes with the same tokens, and says how.

Each fault fires inside the real engine process at a named phase, layer and chunk; the test asserts from the fault's
record that this place was reached.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.launcher import Cluster
from tests.engine.client import ask, metric, record
from tests.engine.clusters import CHUNKED
from tests.engine.prompts import token_prompt

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

NUM_TOKENS = 1300


def body(seed: int) -> dict[str, Any]:
    return {"prompt": token_prompt(NUM_TOKENS, seed), "max_tokens": 10, "ignore_eos": True}


@pytest.mark.parametrize(
    ("transport", "phase", "layer", "chunk"),
    [
        ("shm", "asked", -1, -1),
        ("shm", "accepted", -1, -1),
        ("shm", "push", 0, 0),
        ("shm", "push", 3, 1),
        ("shm", "landed", -1, -1),
        ("zmq", "accepted", -1, -1),
        ("zmq", "push", 3, 1),
        ("zmq", "landed", -1, -1),
    ],
)
def test_the_prefill_instance_dies(
    start: Callable[..., Cluster], plain: Cluster, tmp_path: Path, transport: str, phase: str, layer: int, chunk: int
) -> None:
    reached = tmp_path / "reached"
    fault = {"phase": phase, "layer": layer, "chunk": chunk, "record": str(reached), "action": "kill"}
    cluster = start("1P1D", *CHUNKED, transport=transport, connector_prefill={"fault": fault})
    request = body(31_000)
    answer = ask(cluster.url, request)
    assert answer.outcome() == ask(plain.url, request).outcome()
    place = json.loads(reached.read_text())
    assert (place["phase"], place["layer"], place["chunk"]) == (phase, layer, chunk)
    entry = record(cluster.url, answer)
    if phase == "landed" and entry["tokens"]["handed_over"]:
        assert entry["outcome"] == "landed"
        return
    assert entry["outcome"] == "fell_back", entry
    assert "died" in entry["path"]["why"], entry
    assert entry["tokens"]["computed"] == NUM_TOKENS
    assert entry["tokens"]["handed_over"] == 0
    assert metric(cluster.url, "baton_fallbacks_total") == 1


@pytest.mark.host_memory
@pytest.mark.parametrize(
    ("transport", "connector"),
    [("zmq", {}), ("shm", {"full_digest": True})],
    ids=["zmq", "shm-full-digest"],
)
def test_a_byte_is_flipped_in_transit(
    start: Callable[..., Cluster], plain: Cluster, transport: str, connector: dict[str, Any]
) -> None:
    cluster = start(
        "1P1D", *CHUNKED, transport=transport, connector=connector, connector_prefill={"faulty": {"flip_write": 7}}
    )
    request = body(32_000)
    answer = ask(cluster.url, request)
    assert answer.outcome() == ask(plain.url, request).outcome()
    entry = record(cluster.url, answer)
    assert entry["outcome"] == "fell_back", entry
    assert "digest" in entry["path"]["why"], entry
    assert entry["tokens"]["computed"] == NUM_TOKENS
    assert metric(cluster.url, "baton_fallbacks_total") == 1
    again = ask(cluster.url, body(32_001))
    assert record(cluster.url, again)["outcome"] == "landed", "one flipped byte costs one hand-off, not the peer"


def test_other_weights_are_refused_with_both_values(
    start: Callable[..., Cluster], plain: Cluster, tmp_path: Path
) -> None:
    """The proxy pairs only equal fingerprints, so the prompt is computed on D, and the reason is told."""
    cluster = start(
        "1P1D", *CHUNKED, transport="shm", arguments_prefill=("--dtype", "bfloat16", "--max-model-len", "4096")
    )
    request = body(33_000)
    answer = ask(cluster.url, request)
    assert answer.outcome() == ask(plain.url, request).outcome()
    entry = record(cluster.url, answer)
    assert entry["path"]["why"] == "no_matching_prefill"
    assert entry["tokens"]["computed"] == NUM_TOKENS
