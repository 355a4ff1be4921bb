"""Which GPUs an instance gets: its own where there are enough, with the others visible behind them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.gpus import Gpus, present, shares_of_instances
from core.errors import ConfigError


def test_every_instance_has_gpus_of_its_own_and_sees_the_others() -> None:
    assert shares_of_instances(["0", "1", "2", "3"], [1, 1, 2]) == [
        Gpus(("0", "1", "2", "3")),
        Gpus(("1", "0", "2", "3")),
        Gpus(("2", "3", "0", "1")),
    ]


def test_where_there_are_too_few_they_share_the_memory() -> None:
    prefill, decode = shares_of_instances(["GPU-a"], [1, 1])
    assert prefill == decode == Gpus(("GPU-a",), 0.45)
    first, second, third = shares_of_instances(["0", "1"], [1, 1, 1])
    assert (first.memory_share, second.memory_share, third.memory_share) == (0.45, 0.0, 0.45)
    assert third.visible == ("0", "1")


def test_the_ranks_of_an_instance_are_on_different_gpus() -> None:
    wide = shares_of_instances(["0", "1", "2"], [2, 2])
    assert [each.visible[:2] for each in wide] == [("0", "1"), ("0", "1")]
    with pytest.raises(ConfigError, match="tensor parallel size 4 needs as many GPUs, and 2 are here"):
        shares_of_instances(["0", "1"], [1, 4])


def test_where_none_is_found_cuda_decides() -> None:
    assert shares_of_instances([], [1, 2]) == [Gpus(), Gpus()]


def test_a_process_may_use_what_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    assert present({}, tmp_path) == ["0", "1"]
    assert present({"CUDA_VISIBLE_DEVICES": "3, GPU-b"}, tmp_path) == ["3", "GPU-b"]
    assert present({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == []
