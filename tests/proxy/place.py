"""A proxy in front of fake engines that keep their blocks at a real cache server: all that contexts need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from core.handoff import Role
from kvcache.client import labels
from kvcache.wire import LabelFigures
from proxy.settings import Settings
from tests.kvcache.local_server import serving_here
from tests.proxy.fleet import Fleet, running, until
from tests.proxy.storing import StoringEngine


@dataclass
class Place:
    """A proxy, P and D, and the cache that they keep blocks in."""

    fleet: Fleet
    prefill: StoringEngine
    decode: StoringEngine
    socket: str

    def post(self, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        return self.fleet.client.post("/v1/contexts", json=fields, headers=headers)

    def made(self, headers: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
        response = self.post(headers, **fields)
        assert response.status_code == 201, response.text
        return dict(response.json())

    def ids(self, *texts: str, **fields: Any) -> list[str]:
        return [self.made(text=text, **fields)["id"] for text in texts]

    def complete(self, ids: list[str], prompt: str = "?", **fields: Any) -> httpx.Response:
        return self.fleet.complete(context_ids=ids, prompt=prompt, **fields)

    def labels(self) -> dict[str, LabelFigures]:
        return {figures.name: figures for figures in labels(self.socket)}

    def asked(self) -> dict[str, Any]:
        """The body that D got last."""
        return self.decode.generations()[-1].body


@contextmanager
def placed(folder: Path, **more: Any) -> Iterator[Place]:
    """Everything started, and ready. more: settings of the proxy."""
    with serving_here(folder, 1 << 20) as server, running(settings(server.socket, **more)) as fleet:
        prefill = StoringEngine(Role.PREFILL, "prefill-0", socket=server.socket)
        decode = StoringEngine(Role.DECODE, "decode-0", socket=server.socket)
        with prefill, decode:
            until(lambda: prefill.cache.is_connected and decode.cache.is_connected, "both know the cache")
            fleet.join(prefill, decode)
            yield Place(fleet, prefill, decode, server.socket)


def settings(socket: str, **more: Any) -> Settings:
    """Of a proxy that is quick about everything."""
    return Settings(health_poll_s=0.02, report_wait_s=0.05, takeover_s=0.1, cache_socket=socket, **more)
