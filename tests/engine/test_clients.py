"""Baton talks to what users have: the official client, curl as the README shows it, vLLM's own benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from cluster.launcher import Cluster
from tests.engine.client import ask_all, record
from tests.engine.clusters import CHUNKED
from tests.engine.prompts import token_prompt
from tests.readme import commands

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

QUESTION: list[Any] = [{"role": "user", "content": "What news, my lord? " * 40}]
TOOL: Any = {
    "type": "function",
    "function": {"name": "exeunt", "description": "Leave", "parameters": {"type": "object", "properties": {}}},
}


@pytest.fixture(scope="module")
def cluster(shared_cluster: Any) -> Cluster:
    made: Cluster = shared_cluster("2P2D", *CHUNKED)
    return made


def test_two_of_each_serve_and_each_serves(cluster: Cluster) -> None:
    """2P2D: every request is handed over, and all four instances have taken part."""
    bodies = [{"prompt": token_prompt(500, 90_000 + i), "max_tokens": 3, "ignore_eos": True} for i in range(12)]
    entries = [record(cluster.url, answer) for answer in ask_all(cluster.url, bodies, 4)]
    assert all(entry["outcome"] == "landed" for entry in entries), entries
    assert {entry["path"]["prefill"] for entry in entries} == {"prefill-0", "prefill-1"}
    assert {entry["path"]["decode"] for entry in entries} == {"decode-0", "decode-1"}


def test_the_official_client(cluster: Cluster) -> None:
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", timeout=60)
    assert "baton-demo" in [model.id for model in client.models.list()]
    chat = client.chat.completions.create(model="baton-demo", messages=QUESTION, max_tokens=8, temperature=0)
    stream = client.chat.completions.create(
        model="baton-demo", messages=QUESTION, max_tokens=8, temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == (chat.choices[0].message.content or "")
    both = client.chat.completions.create(model="baton-demo", messages=QUESTION, max_tokens=4, n=2)
    assert [choice.index for choice in both.choices] == [0, 1]
    tools = client.chat.completions.create(
        model="baton-demo", messages=QUESTION, max_tokens=4, tools=[TOOL], tool_choice="none"
    )
    assert tools.choices[0].finish_reason in ("length", "stop")
    plain = client.completions.create(model="baton-demo", prompt="ROMEO:\n" * 60, max_tokens=8)
    assert plain.usage is not None
    assert plain.usage.completion_tokens > 0
    with pytest.raises(openai.BadRequestError, match="kv_transfer_params"):
        client.completions.create(
            model="baton-demo", prompt="a", extra_body={"kv_transfer_params": {"do_remote_prefill": True}}
        )


def test_every_curl_of_the_readme(cluster: Cluster) -> None:
    curls = [command for command in commands() if command.startswith("curl ")]
    assert len(curls) >= 4
    for command in curls:
        ours = command.replace("http://127.0.0.1:8000", cluster.url)
        done = subprocess.run(["bash", "-c", ours], capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.strip(), command
        if "chat/completions" in command:
            assert json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_vllms_own_benchmark_completes(cluster: Cluster, tmp_path: Path) -> None:
    """`vllm bench serve` against the proxy: every request succeeds."""
    tokenizer = cluster.instances[0].spec.model.path
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--base-url", cluster.url]
    command += ["--model", "baton-demo", "--tokenizer", tokenizer, "--dataset-name", "random", "--num-prompts", "12"]
    command += ["--random-input-len", "300", "--random-output-len", "8", "--max-concurrency", "4", "--ignore-eos"]
    command += ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["completed"] == 12
