"""How an instance stays known to the proxy: one HTTP heartbeat a second, with the reports queued since the last.

Standard library only, so that an engine process gains no dependency by it. One daemon thread owns the connection;
`report` and `close` may be called from any thread and never wait for the network. The queue of reports is the only
shared memory: bounded, oldest dropped, and a report leaves it only when the proxy has answered for it. A proxy that
is down or restarts is asked again every second.
"""

from __future__ import annotations

import collections
import http
import http.client
import logging
import threading
from collections.abc import Callable
from urllib.parse import urlsplit

import msgspec

from core.clock import SystemClock
from core.errors import ConfigError
from core.handoff import Peer
from core.report import Report
from core.topology import Heartbeat, InstanceInfo, Welcome
from transport.keys import Keys
from transport.signature import HEADER, sign

HEARTBEAT_INTERVAL_S = 1.0
REQUEST_TIMEOUT_S = 1.0
MAX_QUEUED_REPORTS = 10_000
_NO_BEAT = b"{}"
MAX_REPORTS_PER_HEARTBEAT = 1_000
MAX_ANSWER_BYTES = 1 << 20

_log = logging.getLogger(__name__)


def parse_proxy_url(url: str) -> tuple[str, int]:
    """Host and port of `http://host:port`. Raises ConfigError for anything else."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    plain = host is not None and port is not None and parts.path in ("", "/") and "@" not in parts.netloc
    if not plain or parts.scheme != "http" or parts.query or parts.fragment:
        raise ConfigError(
            f"proxy address {url!r} is not of the form http://HOST:PORT, for example http://127.0.0.1:8000"
        )
    assert host is not None
    assert port is not None
    return host, port


def check_keys(proxy_url: str, keys: Keys | None) -> None:
    """Asks a proxy, before a long start, whether it would take our heartbeats. Raises ConfigError if it would not; one
    that is not there yet cannot tell."""
    host, port = parse_proxy_url(proxy_url)
    connection = http.client.HTTPConnection(host, port, timeout=REQUEST_TIMEOUT_S)
    try:
        connection.request("POST", "/instances", _NO_BEAT, _headers(keys, _NO_BEAT))
        response = connection.getresponse()
        words = response.read(MAX_ANSWER_BYTES).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return
    finally:
        connection.close()
    if response.status == http.HTTPStatus.FORBIDDEN:
        raise ConfigError(f"the proxy {proxy_url} refuses this instance: {words}")


def _headers(keys: Keys | None, body: bytes) -> dict[str, str]:
    signed = {HEADER: sign(keys, body, SystemClock().unix_s())} if keys is not None else {}
    return {"Content-Type": "application/json"} | signed


class JoinThread:
    """Joins at once, then heartbeats until closed.

    info: called on the thread before each heartbeat; says what the instance is and how loaded it is. keys: heartbeats
    are signed by them. on_peers: called on the thread after each answer, with the instances that may send to this one.
    """

    def __init__(
        self,
        proxy_url: str,
        info: Callable[[], InstanceInfo],
        keys: Keys | None = None,
        on_peers: Callable[[list[Peer]], None] = lambda peers: None,
    ) -> None:
        self._address = parse_proxy_url(proxy_url)
        self._info = info
        self._keys = keys
        self._on_peers = on_peers
        self._reports: collections.deque[Report] = collections.deque(maxlen=MAX_QUEUED_REPORTS)
        self._wake = threading.Condition()
        self._closing = False
        self._leaving = False
        self._connection: http.client.HTTPConnection | None = None
        self._thread = threading.Thread(target=self._run, name="baton-join", daemon=True)
        self._thread.start()

    def report(self, report: Report) -> None:
        """Queues a report and wakes the thread."""
        with self._wake:
            self._reports.append(report)
            self._wake.notify()

    def close(self, leaving: bool = True) -> None:
        """Stops the thread; with `leaving`, after one last heartbeat that says so. Returns within about a second."""
        with self._wake:
            self._closing, self._leaving = True, leaving
            self._wake.notify()
        self._thread.join(REQUEST_TIMEOUT_S)

    def _run(self) -> None:
        reached = True
        while True:
            now_reached = self._beat()
            if now_reached != reached:
                _log.warning("proxy %s:%d %s", *self._address, "is back" if now_reached else "does not answer")
                reached = now_reached
            with self._wake:
                if not self._closing and not (now_reached and self._reports):
                    self._wake.wait_for(self._due if reached else self._is_closing, HEARTBEAT_INTERVAL_S)
                if self._closing:
                    break
        if self._leaving:
            self._beat()
        self._disconnect()

    def _is_closing(self) -> bool:
        return self._closing

    def _due(self) -> bool:
        return self._closing or bool(self._reports)

    def _beat(self) -> bool:
        """One heartbeat; True if the proxy answered."""
        with self._wake:
            batch = [self._reports[i] for i in range(min(len(self._reports), MAX_REPORTS_PER_HEARTBEAT))]
            leaving = self._leaving
        try:
            status, words = self._post(msgspec.json.encode(Heartbeat(self._info(), batch, leaving)))
            if status == http.HTTPStatus.OK:
                self._on_peers(msgspec.json.decode(words, type=Welcome).peers)
        except Exception:  # noqa: BLE001 - `info` belongs to the engine; a dead thread would make a live instance look dead
            _log.exception("heartbeat failed")
            return False
        if status is None or status >= 500:
            return False
        if status >= 400:  # the proxy will never take these; keeping them would block every later one
            _log.warning("proxy %s:%d refused a heartbeat: %d %s", *self._address, status, words)
        self._forget(batch)
        return status < 400

    def _forget(self, batch: list[Report]) -> None:
        """Removes what was sent, unless the bound has dropped it meanwhile."""
        with self._wake:
            for sent in batch:
                if self._reports and self._reports[0] is sent:
                    self._reports.popleft()

    def _post(self, body: bytes) -> tuple[int | None, str]:
        """The answer's status, or None without one, and its words. A kept connection that the proxy has closed is
        renewed once."""
        headers = _headers(self._keys, body)
        for _ in range(2):
            fresh = self._connection is None
            if self._connection is None:
                self._connection = http.client.HTTPConnection(*self._address, timeout=REQUEST_TIMEOUT_S)
            try:
                self._connection.request("POST", "/instances", body, headers)
                response = self._connection.getresponse()
                words = response.read(MAX_ANSWER_BYTES).decode(errors="replace")
                if not response.isclosed():
                    self._disconnect()
                return response.status, words
            except (OSError, http.client.HTTPException) as error:
                self._disconnect()
                if fresh or isinstance(error, TimeoutError):
                    return None, ""
        return None, ""

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
