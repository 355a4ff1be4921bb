"""`baton instance`: vLLM started plainly, joined to a proxy from outside, moving KV over TCP."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests

from cluster.bundled import BUNDLED_NAME
from cluster.members import get
from cluster.ports import free_ports
from cluster.processes import living_groups, start_child, stop_groups
from engine.instance import source_path
from tests.poll import until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]
START_TIMEOUT_S = 240.0


@pytest.fixture
def proxy_url(tmp_path: Path) -> Iterator[str]:
    port = free_ports(1, "127.0.0.1")[0]
    command = [sys.executable, "-P", "-m", "proxy", "--host", "127.0.0.1", "--port", str(port)]
    child = start_child(command, {"PYTHONPATH": source_path()}, tmp_path / "proxy.log")
    url = f"http://127.0.0.1:{port}"
    until(lambda: get(f"{url}/health")[0], what="the proxy")
    yield url
    stop_groups([child])


def test_two_plainly_started_instances_join_a_proxy_and_hand_over_by_tcp(proxy_url: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        started = [stack.enter_context(_instance(role, proxy_url, tmp_path)) for role in ("prefill", "decode")]
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("ready http://127.0.0.1:"), _log(tmp_path)
        until(lambda: _states(proxy_url) == ["ready", "ready"], what="both to be ready")
        body: dict[str, Any] = {
            "model": BUNDLED_NAME,
            "prompt": list(range(100, 500)),
            "max_tokens": 4,
            "temperature": 0,
        }
        answer = requests.post(f"{proxy_url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        record = requests.get(f"{proxy_url}/requests/{answer.headers['x-request-id']}", timeout=10).json()
        assert record["path"]["transport"] == "zmq", record
        assert record["tokens"] == {"prompt": 400, "handed_over": 399, "found_locally": 0, "computed": 1}
        for process in started:
            process.send_signal(signal.SIGTERM)
        for process in started:
            assert process.wait(15) == 130
    assert not living_groups({process.pid for process in started})
    assert all(state == "leaving" for state in _states(proxy_url))


def _instance(role: str, proxy_url: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "baton", "instance", "--role", role, "--join", proxy_url, "--transport", "zmq"]
    command += ["--", "--max-model-len", "2048"]
    environment = dict(os.environ, PYTHONPATH=source_path())
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with (folder / f"{role}.err").open("w") as errors:
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, start_new_session=True
        )


def _states(proxy_url: str) -> list[str]:
    return [entry["state"] for entry in requests.get(f"{proxy_url}/instances", timeout=10).json()["instances"]]


def _log(folder: Path) -> str:
    return "\n".join(path.read_text() for path in folder.glob("*.err"))
