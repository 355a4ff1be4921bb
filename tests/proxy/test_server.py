"""The proxy as a process."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator

import pytest

from core.errors import ConfigError
from proxy.server import listen, parse_options


@contextlib.contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "proxy", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        watchdog = threading.Timer(20, child.kill)
        watchdog.start()
        try:
            yield child
        finally:
            watchdog.cancel()
            child.kill()


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_it_listens_and_ends_cleanly(end: signal.Signals) -> None:
    began = time.monotonic()
    with process("--port", "0") as child:
        assert child.stdout is not None
        assert child.stderr is not None
        line = child.stdout.readline()
        assert line.startswith("proxy listening http://127.0.0.1:"), child.stderr.read()
        assert time.monotonic() - began < 10, "about a second, on a quiet machine"
        with pytest.raises(urllib.error.HTTPError, match="503") as error:
            urllib.request.urlopen(line.split()[-1] + "/health")
        error.value.close()
        child.send_signal(end)
        assert child.wait(10) == 0
        assert child.stderr.read() == ""


def test_a_used_port_is_one_clear_line() -> None:
    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        with process("--port", str(port)) as child:
            assert child.wait(20) == 1
            assert child.stderr is not None
            assert child.stderr.read() == f"proxy: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_a_port_or_host_that_cannot_be_is_one_clear_line_too() -> None:
    for host, port in [("127.0.0.1", 70000), ("no.such.host.invalid", 0)]:
        with pytest.raises(ConfigError, match=f"cannot listen on {host}:{port}"):
            listen(host, port)


def test_options_become_settings() -> None:
    host, port, settings = parse_options(
        [
            *["--host=::1", "--port=7", "--queue-limit=2", "--window=3", "--timeout-s=4.5", "--threshold=5"],
            "--open-control",
        ]
    )
    assert (host, port) == ("::1", 7)
    assert (settings.queue_limit, settings.window, settings.timeout_s, settings.threshold) == (2, 3, 4.5, 5)
    assert settings.open_control
    with pytest.raises(SystemExit):
        parse_options(["--window", "0"])


def test_the_proxy_imports_neither_torch_nor_vllm() -> None:
    code = "import sys, proxy.server; print([m for m in ('torch', 'vllm', 'numpy') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
