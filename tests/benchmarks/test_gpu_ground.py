"""The benchmarks that wait for a GPU run on host memory, and say where there is none."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from transport.cuda_device import unavailable


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--megabytes", "4", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize("name", ["cuda_ipc", "device_cache"])
def test_on_host_memory_it_shows_that_it_runs(name: str) -> None:
    ended = run(name, "--host")
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    assert told["is_host"]
    assert len(told["rows"]) == 3, "a row per model"


@pytest.mark.skipif(not unavailable(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda_ipc", "device_cache"])
def test_without_a_gpu_it_says_so(name: str) -> None:
    ended = run(name)
    assert ended.returncode == 1
    assert "NVIDIA driver" in ended.stderr or "no GPU" in ended.stderr
