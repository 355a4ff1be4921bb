"""Fixtures: a proxy with one prefill and one decode instance, and a proxy that nobody has joined."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from core.handoff import Role
from proxy.settings import Settings
from tests.fakes.engine import FakeEngine
from tests.proxy.fleet import Fleet, engines, running


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with running(Settings(health_poll_s=0.02, report_wait_s=0.3, takeover_s=0.1)) as fleet:
        yield fleet


@pytest.fixture
def pair(fleet: Fleet) -> Iterator[tuple[FakeEngine, FakeEngine]]:
    """P and D, ready."""
    with engines(Role.PREFILL, Role.DECODE) as (prefill, decode):
        fleet.join(prefill, decode)
        yield prefill, decode
