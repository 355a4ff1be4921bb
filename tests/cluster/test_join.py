"""An instance stays known to the proxy, and no report is lost while the proxy is away."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec
import pytest

from core.errors import ConfigError
from core.handoff import Role
from core.report import Report
from core.topology import Heartbeat, InstanceInfo
from tests.poll import until
from transport import join
from transport.join import JoinThread, parse_proxy_url

INFO = InstanceInfo("decode-0", Role.DECODE, "http://127.0.0.1:1", boot_id="b")


class Proxy:
    """Takes heartbeats on a port until it is closed."""

    def __init__(self, port: int = 0, status: int = 200) -> None:
        self.beats: list[Heartbeat] = []
        self.connections: list[socket.socket] = []
        self.status = status
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                proxy.connections.append(self.connection)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.path == "/instances"
                proxy.beats.append(msgspec.json.decode(body, type=Heartbeat))
                self.send_response(proxy.status)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def reports(self) -> list[str]:
        return [report.request_id for beat in self.beats for report in beat.reports]

    def close(self) -> None:
        self._server.shutdown()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    made = Proxy()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join, "HEARTBEAT_INTERVAL_S", 0.05)


def test_joins_at_once_heartbeats_and_says_goodbye(proxy: Proxy) -> None:
    thread = JoinThread(proxy.url, lambda: INFO)
    until(lambda: len(proxy.beats) >= 3)
    thread.close(leaving=True)
    assert proxy.beats[0] == Heartbeat(INFO)
    assert [beat.leaving for beat in proxy.beats[-2:]] == [False, True]


def test_closes_without_goodbye_when_told_so(proxy: Proxy) -> None:
    thread = JoinThread(proxy.url, lambda: INFO)
    until(lambda: proxy.beats)
    thread.close(leaving=False)
    assert not any(beat.leaving for beat in proxy.beats)


def test_a_report_goes_out_at_once_and_once(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join, "HEARTBEAT_INTERVAL_S", 30.0)
    thread = JoinThread(proxy.url, lambda: INFO)
    until(lambda: proxy.beats)
    for number in range(20):
        thread.report(_report(number))
    until(lambda: len(proxy.reports()) >= 20, timeout_s=5)
    thread.close()
    assert proxy.reports() == [str(number) for number in range(20)]


def test_reports_wait_for_a_proxy_that_is_away() -> None:
    first = Proxy()
    thread = JoinThread(first.url, lambda: INFO)
    until(lambda: first.beats)
    first.close()
    for number in range(3):
        thread.report(_report(number))
    second = Proxy(first.port)
    until(lambda: second.reports() == ["0", "1", "2"])
    thread.close()
    second.close()


def test_the_oldest_reports_make_room_while_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join, "MAX_QUEUED_REPORTS", 4)
    gone = Proxy()
    gone.close()
    thread = JoinThread(gone.url, lambda: INFO)
    for number in range(10):
        thread.report(_report(number))
    back = Proxy(gone.port)
    until(lambda: back.reports() == ["6", "7", "8", "9"])
    thread.close()
    back.close()


def test_a_refused_heartbeat_does_not_block_later_reports(proxy: Proxy) -> None:
    proxy.status = 400
    thread = JoinThread(proxy.url, lambda: INFO)
    thread.report(_report(1))
    until(lambda: "1" in proxy.reports())
    proxy.status = 200
    thread.report(_report(2))
    until(lambda: "2" in proxy.reports())
    thread.close()


def test_close_is_bounded_when_nobody_listens() -> None:
    gone = Proxy()
    gone.close()
    thread = JoinThread(gone.url, lambda: INFO)
    start = time.monotonic()
    thread.close()
    assert time.monotonic() - start < 1.5


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000", "https://host:1", "http://host", "http://host:x", "http://h:1/path", "http://u@h:1"]
)
def test_a_wrong_address_is_refused_with_an_example(url: str) -> None:
    with pytest.raises(ConfigError, match="http://HOST:PORT"):
        JoinThread(url, lambda: INFO)


def test_reads_host_and_port() -> None:
    assert parse_proxy_url("http://10.0.0.1:8000/") == ("10.0.0.1", 8000)
    assert parse_proxy_url("http://[::1]:8000") == ("::1", 8000)


def _report(number: int) -> Report:
    return Report(str(number), "decode-0", Role.DECODE, "landed")
