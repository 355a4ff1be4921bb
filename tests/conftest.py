"""Fixtures that every folder may use: one preloaded process per session, and clusters that leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cluster.bundled import BUNDLED_FOLDER
from cluster.launcher import Cluster
from cluster.options import ClusterOptions
from cluster.processes import living_groups
from cluster.runfolder import RunFolder
from cluster.zygote import Zygote
from engine.build import Device, installed_build

MakeCluster = Callable[..., Cluster]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tokens are the same to the last bit on a CPU alone; what is tested of engines on a GPU is marked so."""
    if installed_build().device is Device.CPU:
        return
    for item in items:
        if item.get_closest_marker("engine"):
            item.add_marker(pytest.mark.skip(reason="compares the tokens of engines on a CPU"))


@pytest.fixture(scope="session")
def model_path() -> str:
    """The bundled model."""
    return str(BUNDLED_FOLDER)


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote | None]:
    """Forks servers in two seconds; None on a GPU, where each is started plainly."""
    if installed_build().device is not Device.CPU:
        yield None
        return
    folder = RunFolder.create()
    preloaded = Zygote(folder.path)
    yield preloaded
    preloaded.close()
    folder.remove()


@pytest.fixture
def make_cluster(zygote: Zygote | None) -> Iterator[MakeCluster]:
    """`make_cluster("1P1D", transport="shm", ...)`: a ready cluster; at the test's end no process of it may be left."""
    made: list[Cluster] = []

    def make(topology: str, **options: Any) -> Cluster:
        cluster = Cluster(topology, ClusterOptions(**options), zygote=zygote)
        made.append(cluster)
        cluster.start()
        return cluster

    yield make
    for cluster in made:
        groups = {member.pid for member in cluster.members if member.pid}
        cluster.stop()
        assert not living_groups(groups), "the cluster left processes behind"
