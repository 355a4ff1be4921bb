"""An engine names the shape of its blocks where it is known, and none where it is not."""

from __future__ import annotations

import msgspec
import pytest

from core.layout import KVLayout
from engine.cache_side import shape_of
from kvcache.shape import BlockShape

LAYOUT = KVLayout(
    model="m",
    dtype="bfloat16",
    num_layers=4,
    num_kv_heads=2,
    head_size=64,
    block_size=128,
    block_bytes=2 * 2 * 64 * 128 * 2,
    order="LBHNC",
    isa="vec",
)


def test_the_cpus_blocks_have_one_heads_keys_and_then_its_values_in_one_piece_each() -> None:
    assert shape_of(LAYOUT) == BlockShape("bfloat16", 4, 64 * 128)


@pytest.mark.parametrize(
    "other", [{"isa": ""}, {"order": "LBNHC"}, {"dtype": "float8_e4m3fn"}, {"block_bytes": 2 * 2 * 64 * 128 * 2 + 512}]
)
def test_where_heads_lie_elsewhere_nothing_is_said(other: dict[str, object]) -> None:
    assert shape_of(msgspec.structs.replace(LAYOUT, **other)) is None
