"""What Baton changes in vLLM is checked before anything is changed; what runs inside vLLM never raises."""

from __future__ import annotations

import multiprocessing
import os
import sys
from types import ModuleType

import pytest

from core.errors import UnsupportedError
from engine import patches, plugin

NAMES = ("vllm_fake_asked", "vllm_fake_asking")


def original() -> str:
    return "spawn"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> list[ModuleType]:
    made = [ModuleType(name) for name in NAMES]
    for module in made:
        vars(module)["get_mp_context"] = original
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(patches, "_ASKING_MODULES", NAMES)
    return made


def test_every_module_that_asks_gets_the_forking_context(modules: list[ModuleType]) -> None:
    patches.fork_engines()
    for module in modules:
        assert vars(module)["get_mp_context"]() is multiprocessing.get_context("fork")


def test_a_vllm_that_asks_elsewhere_is_refused_and_left_alone(modules: list[ModuleType]) -> None:
    del vars(modules[1])["get_mp_context"]
    with pytest.raises(UnsupportedError, match="no get_mp_context in vllm_fake_asking"):
        patches.fork_engines()
    assert vars(modules[0])["get_mp_context"] is original


def test_the_plugin_never_raises(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise RuntimeError("no AMX here")

    monkeypatch.setattr(plugin, "allow_amx", broken)
    plugin.register()
    assert "no AMX here" in caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GOMP_CPU_AFFINITY", "2 3"),
        ("OMP_PLACES", "{2,3}"),
        ("KMP_AFFINITY", "granularity=fine,explicit,proclist=[2,3]"),
    ],
)
def test_a_tensor_parallel_rank_computes_on_its_share_of_the_engines_cores(name: str, value: str) -> None:
    engine = {"BATON_ENGINE_CORES": "2,3,4,5"}
    assert plugin.engine_cores(engine) == {2, 3, 4, 5}
    assert plugin.engine_cores(engine | {name: value}) == {2, 3}
    assert plugin.engine_cores({"BATON_ENGINE_CORES": "0,1"} | {name: value}) == {0, 1}, "not a share of ours"
    assert plugin.engine_cores({name: value}) == set()


def test_cores_that_are_gone_do_not_stop_an_engine() -> None:
    before = os.sched_getaffinity(0)
    plugin.bind_engine({"BATON_ENGINE_CORES": "4095"})
    plugin.bind_engine({})
    assert os.sched_getaffinity(0) == before
