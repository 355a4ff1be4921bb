"""A real proxy on a free port, fake engines that have joined it, and the questions that tests ask."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import msgspec

from core.clock import SystemClock
from core.handoff import Role
from core.report import Report
from core.topology import Heartbeat
from proxy.app import Proxy, make_app
from proxy.server import listen, make_server
from proxy.settings import Settings
from tests.fakes.engine import FakeEngine

LIMIT_S = 5.0


def until(condition: Callable[[], object], what: str) -> None:
    """Polls, up to a bound."""
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, f"waited {LIMIT_S} s in vain until {what}"
        time.sleep(0.005)


class Fleet:
    """One proxy under test and its client."""

    def __init__(self, proxy: Proxy, url: str) -> None:
        self.proxy = proxy
        self.url = url
        self.client = httpx.Client(base_url=url, timeout=20.0, trust_env=False, verify=False)

    def beat(self, engine: FakeEngine, *reports: Report, leaving: bool = False) -> None:
        body = msgspec.json.encode(Heartbeat(engine.info(), list(reports), leaving))
        assert self.client.post("/instances", content=body).json()["known"]

    def join(self, *engines: FakeEngine) -> None:
        for engine in engines:
            self.beat(engine)
        for engine in engines:
            until(lambda engine=engine: self.state(engine) == "ready", f"{engine.name} is ready")  # type: ignore[misc]

    def state(self, engine: FakeEngine) -> str:
        return str(self.instance(engine)["state"])

    def instance(self, engine: FakeEngine) -> dict[str, Any]:
        every = self.client.get("/instances").json()["instances"]
        return next(dict(i) for i in every if i["name"] == engine.name)

    def chat(self, **fields: Any) -> httpx.Response:
        body = {"model": "fake", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        return self.client.post("/v1/chat/completions", json=body | fields)

    def complete(self, **fields: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json={"model": "fake", "prompt": "hello", "max_tokens": 4} | fields)

    def record(self, response: httpx.Response) -> dict[str, Any]:
        answer = self.client.get(f"/requests/{response.headers['x-request-id']}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def metric(self, line: str) -> float:
        """The value of the metric that is written so, 0 if it is not there."""
        for text in self.client.get("/metrics").text.splitlines():
            if text.startswith(line + " "):
                return float(text.rpartition(" ")[2])
        return 0.0

    @contextlib.contextmanager
    def in_background(self, ask: Callable[[], httpx.Response]) -> Iterator[list[httpx.Response]]:
        """Asks in a thread; the answer is in the list after the block."""
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(ask()), daemon=True)
        thread.start()
        yield answers
        thread.join(LIMIT_S)
        assert answers, "no answer came"


@contextlib.contextmanager
def running(settings: Settings) -> Iterator[Fleet]:
    """Starts a proxy in a thread; stops it at the end and checks that its places are all free again."""
    app = make_app(settings, SystemClock())
    sock = listen("127.0.0.1", 0)
    server = make_server(app, "")
    thread = threading.Thread(target=server.run, args=([sock],), name="proxy", daemon=True)
    thread.start()
    fleet = Fleet(app.state.proxy, f"http://127.0.0.1:{sock.getsockname()[1]}")
    until(lambda: server.started, "the proxy has started")
    try:
        yield fleet
        until(lambda: _all_free(fleet.proxy), "all places are free again")
    finally:
        fleet.client.close()
        server.should_exit = True
        thread.join(LIMIT_S)
        sock.close()
    assert not thread.is_alive()


def _all_free(proxy: Proxy) -> bool:
    idle = all(i.outstanding == 0 and not i.legs for i in proxy.registry.all())
    return idle and proxy.admission.queue_length == 0


@contextlib.contextmanager
def engines(*roles: Role) -> Iterator[list[FakeEngine]]:
    """Fake engines named prefill-0, decode-1 and so on."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(FakeEngine(role, f"{role.value}-{i}")) for i, role in enumerate(roles)]
