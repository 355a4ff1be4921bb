"""Fixtures: a proxy with engines and a cache, and each of the two clients before it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.client.blocking import client_of
from tests.proxy.place import Place, placed


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with placed(tmp_path) as made:
        yield made


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def client(kind: str, place: Place) -> Iterator[Any]:
    def never(seconds: float) -> None:
        raise AssertionError(f"nothing is to be waited for, not {seconds} s")

    with client_of(kind, place.fleet.url, never, model="fake") as made:
        yield made
