"""Instances join a proxy by hand: the README's two lines, run as they stand but for the ports.

This is also CI's one 1P1D by the plain start: no preloaded process, vLLM's own multi-process executor on the side that
is started by `vllm serve`, and TCP between the two.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import requests

from cluster.launcher import Cluster
from cluster.ports import free_ports
from cluster.processes import living_groups, signal_group
from tests.engine.client import ask, record
from tests.engine.prompts import token_prompt
from tests.engine.test_keys import listening
from tests.poll import until
from tests.readme import ROOT, commands

pytestmark = [pytest.mark.engine, pytest.mark.timeout(500)]

FLOAT32 = "--dtype float32 --max-model-len 4096"


@contextmanager
def running(command: list[str], log: Path, cores: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process group of its own, ended as Ctrl-C would, then by force."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": cores, "PYTHONPATH": str(ROOT), "TMPDIR": str(log.parent)}
    with log.open("wb") as out:
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        yield child
    finally:
        signal_group(child.pid, signal.SIGINT)
        try:
            child.wait(20)
            until(lambda: not living_groups({child.pid}), 20, "the group to end")
        finally:
            signal_group(child.pid, signal.SIGKILL)
            child.wait(20)


def test_the_readmes_lines_by_hand(plain: Cluster, tmp_path: Path) -> None:
    proxy_port, instance_port = free_ports(2, "127.0.0.1")
    url = f"http://127.0.0.1:{proxy_port}"
    lines = [line.replace("http://127.0.0.1:8000", url).replace("8201", str(instance_port)) for line in commands()]
    serve = shlex.split(next(line for line in lines if line.startswith("vllm serve ")) + " " + FLOAT32)
    join = shlex.split(next(line for line in lines if line.startswith("baton instance ")))
    join += ["--transport", "zmq", "--", *shlex.split(FLOAT32)]
    proxy = [sys.executable, "-P", "-m", "proxy", "--port", str(proxy_port)]
    cores = sorted(os.sched_getaffinity(0))
    with (
        running(proxy, tmp_path / "proxy.log", ""),
        running(serve, tmp_path / "serve.log", str(cores[0])),
        running(join, tmp_path / "join.log", str(cores[-1])) as joined,
    ):
        until(lambda: _num_ready(url) == 2, 240, f"both to be ready; logs in {tmp_path}")
        descendants = [child.pid for child in psutil.Process(joined.pid).children(recursive=True)]
        bound = {each for pid in (joined.pid, *descendants) for each in listening(pid)}
        assert len(bound) >= 3, "HTTP, control and zmq"
        assert {host for host, _ in bound} == {"127.0.0.1"}, bound
        request = {"prompt": token_prompt(900, 95_000), "max_tokens": 8, "ignore_eos": True}
        answer = ask(url, request)
        entry = record(url, answer)
        assert entry["outcome"] == "landed", entry
        assert entry["path"]["prefill"] == "by-hand"
        assert entry["path"]["transport"] == "zmq"
        assert answer.outcome() == ask(plain.url, request).outcome()
        joined.send_signal(signal.SIGTERM)
        assert joined.wait(20) == 130
        assert not living_groups({joined.pid})
        assert [each["state"] for each in _listing(url) if each["role"] == "decode"] == ["leaving"]


def _listing(url: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = requests.get(f"{url}/instances", timeout=5).json()["instances"]
    return entries


def _num_ready(url: str) -> int:
    try:
        return sum(each["state"] == "ready" for each in _listing(url))
    except requests.ConnectionError:
        return 0
