"""Fixtures of engine tests: clusters shared by a module, all forked from one preloaded process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from cluster.launcher import Cluster
from tests.engine.clusters import options


@pytest.fixture(scope="module")
def shared_cluster(zygote: Any) -> Iterator[Callable[..., Cluster]]:
    """`shared_cluster("1P1D", *vllm_arguments, transport="shm", ...)`: started once per module and arguments."""
    with ExitStack() as stack:
        known: dict[str, Cluster] = {}

        def make(topology: str, *arguments: str, **more: Any) -> Cluster:
            key = repr((topology, arguments, sorted(more.items())))
            if key not in known:
                known[key] = stack.enter_context(Cluster(topology, options(*arguments, **more), zygote=zygote))
            return known[key]

        yield make


@pytest.fixture
def start(zygote: Any) -> Iterator[Callable[..., Cluster]]:
    """`start("1P1D", *vllm_arguments, transport="shm", ...)`: a cluster of the test's own, to be broken."""
    with ExitStack() as stack:

        def make(topology: str, *arguments: str, **more: Any) -> Cluster:
            return stack.enter_context(Cluster(topology, options(*arguments, **more), zygote=zygote))

        yield make


@pytest.fixture(scope="session")
def plain(zygote: Any) -> Iterator[Cluster]:
    """One plain vLLM behind the proxy: what everything is compared with."""
    with Cluster("0P1D", options(), zygote=zygote) as cluster:
        yield cluster
