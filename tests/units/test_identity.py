"""Two instances have the same model only where the same configuration meets the same weights, wherever they lie."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from core.layout import KVLayout
from engine.identity import model_identity

CONFIG = {"hidden_size": 8, "rope_theta": 10000.0, "_name_or_path": "/somewhere"}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 8192)
    return folder


def test_the_same_model_in_two_folders_is_one(weights: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(weights, copy)
    here = model_identity(CONFIG, str(weights), None, {})
    assert model_identity(CONFIG | {"_name_or_path": "copy"}, str(copy), None, {}) == here


@pytest.mark.parametrize("change", [{"rope_theta": 20000.0}, {"hidden_size": 16}, {"rope_scaling": {"type": "yarn"}}])
def test_another_configuration_is_another_model(weights: Path, change: dict[str, object]) -> None:
    assert model_identity(CONFIG | change, str(weights), None, {}) != model_identity(CONFIG, str(weights), None, {})


def test_other_weights_are_another_model(weights: Path) -> None:
    before = model_identity(CONFIG, str(weights), None, {})
    (weights / "model.safetensors").write_bytes(bytes(reversed(range(256))) * 8192)
    assert model_identity(CONFIG, str(weights), None, {}) != before


def test_dummy_weights_differ_by_seed_and_hub_models_by_revision(weights: Path) -> None:
    assert model_identity({}, "a/b", "1", {"seed": "0"}) != model_identity({}, "a/b", "1", {"seed": "1"})
    assert model_identity({}, "a/b", "1", {}) != model_identity({}, "a/b", "2", {})


LAYOUT = KVLayout("m", "bfloat16", 24, 2, 64, 128, 65536, "LBHNC", "vec")


@pytest.mark.parametrize(
    ("field", "value"),
    [("model", "n"), ("dtype", "float32"), ("block_size", 64), ("order", "NHD"), ("isa", "amx"), ("protocol", 99)],
)
def test_layouts_that_differ_in_any_field_are_told_apart_with_both_values(field: str, value: object) -> None:
    fields = {name: getattr(LAYOUT, name) for name in LAYOUT.__struct_fields__}
    other = KVLayout(**(fields | {field: value}))
    assert other.fingerprint() != LAYOUT.fingerprint()
    assert LAYOUT.differences(other) == f"{field}: ours {fields[field]!r}, theirs {value!r}"
    assert LAYOUT.differences(LAYOUT) == ""
