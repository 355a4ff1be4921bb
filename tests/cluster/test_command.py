"""`baton` says in one line what is wrong, and what was meant."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def baton(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).resolve().parents[2]))
    command = [sys.executable, "-m", "baton", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sreve", "1P1D"], "did you mean serve?"),
        (["serve"], "xPyD"),
        (["serve", "1D1P"], "not of the form xPyD"),
        (["serve", "1P0D"], "no decode instance"),
        (["serve", "1P1D", "--model", "/no/such/model"], "model /no/such/model: no such folder"),
        (["serve", "1P1D", "--modle", "x"], "did you mean --model?"),
        (["serve", "1P1D", "--port", "99999"], "port 99999 is not between"),
        (["serve", "1P1D", "--host", "192.0.2.1"], "--open-control"),
        (["serve", "1P1D", "--host", "0.0.0.0", "--open-control"], "as other hosts reach it"),
        (["serve", "1P1D", "--transport", "rdma"], "invalid choice: 'rdma'"),
        (["serve", "1P1D", "--prefill-args", "--tensor-parallel-size 3"], "tensor parallel size 3"),
        (["serve", "1P1D", "--prefill-args", "-tp two"], "'two' is not a number of at least 1"),
        (["serve", "1P1D", "--decode-args", "-pp 2"], "pipeline parallel size 2"),
        (["serve", "1P1D", "--decode-args", "--port=9"], "--port is set by Baton"),
        (["serve", "1P1D", "--decode-args", "--kv-cache-memory-bytes 900G"], "too little memory"),
        (["serve", "1P1D", "--decode-args", "'"], "No closing quotation"),
        (["instance", "--role", "prefill"], "--join"),
        (["instance", "--role", "prefill", "--join", "proxy:80"], "http://HOST:PORT"),
        (["demo", "--fast"], "unknown argument '--fast'"),
        (["bench", "nothing"], "handoff"),
        (["keys"], "PATH"),
        (["keys", "/"], "is there already and is kept"),
        (["serve", "1P1D", "--keys", "/no/such/file"], "make one with: baton keys /no/such/file"),
        (["instance", "--role", "decode", "--join", "http://h:1", "--keys", "/"], "key file /: Is a directory"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(arguments: list[str], said: str) -> None:
    result = baton(*arguments)
    assert result.returncode == 2, result.stderr
    assert said in result.stderr
    assert result.stderr.startswith("baton: ")
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def test_keys_are_made_once_and_never_shown(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    result = baton("keys", str(path))
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert f"--keys {path}" in result.stderr
    secrets = re.findall(r'"(?:public|secret)": "(.+)"', path.read_text())
    assert len(secrets) == 4
    assert not any(secret in result.stderr for secret in secrets)
    path.chmod(0o644)
    refused = baton("serve", "1P1D", "--keys", str(path))
    assert refused.returncode == 2
    assert f"chmod 600 {path}" in refused.stderr
    path.chmod(0o600)
    peers = baton("serve", "1P1D", "--keys", str(path), "--cache", "1GiB,listen=127.0.0.1:7600")
    assert peers.returncode == 2
    assert "leave these words out of --cache" in peers.stderr


def test_a_used_port_is_one_line_and_exit_code_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = baton("serve", "0P1D", "--port", str(port))
    assert result.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_help_names_the_commands() -> None:
    result = baton("--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("serve", "instance", "demo", "bench"))
    assert "--prefill-args" in baton("serve", "--help").stdout
