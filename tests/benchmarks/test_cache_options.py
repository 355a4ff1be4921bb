"""`baton bench cache`'s command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import cache_options
from benchmarks.cache_options import parse
from core.errors import ConfigError


@pytest.fixture(autouse=True)
def _with_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_options, "redis_binary", lambda: "/usr/bin/redis-server")


def test_the_kv_shape_has_the_same_bytes_per_token_on_either_kind_of_processor() -> None:
    for has_bfloat16, dtype in ((True, "bfloat16"), (False, "float32")):
        recipe = parse([], has_bfloat16).recipe
        assert (recipe.dtype, recipe.token_bytes, recipe.shape.num_layers) == (dtype, 28_672, 28)


def test_lmcache_is_measured_where_its_packages_are(tmp_path: Path) -> None:
    names = {system.name for system in parse([], False).systems}
    assert {"plain", "prefix", "host", "disk", "redis"} <= names
    assert not any(name.startswith("lmcache") for name in names)
    (tmp_path / "lmcache-0.5.6.dist-info").mkdir()
    options = parse(["--lmcache", str(tmp_path)], False)
    assert {"lmcache", "lmcache-disk", "lmcache-redis"} <= {system.name for system in options.systems}


def test_quick_means_less_of_everything_and_a_named_option_wins() -> None:
    quick, whole = parse(["--quick"], False), parse([], False)
    assert len(quick.systems) < len(whole.systems)
    assert (quick.repeats, quick.requests) < (whole.repeats, whole.requests)
    assert parse(["--quick", "--repeats", "5"], False).repeats == 5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--systems", "plane"], "unknown system 'plane'; known: plain, prefix"),
        (["--systems", "plain,lmcache"], "needs --lmcache FOLDER, made by scripts/lmcache_env"),
        (["--lmcache", "/nowhere"], "does not hold LMCache 0.5.6; make it: scripts/lmcache_env"),
        (["--workloads", "rag,chat"], "--workloads: unknown 'chat'; known: multi-turn"),
        (["--parts", "tier"], "--parts: unknown 'tier'; known: tiers"),
        (["--reuse", "0,99"], "--reuse: 99 is not between 0 and 95"),
        (["--data", "/nowhere"], "--data /nowhere: no such folder"),
        (["--state", "/nowhere/x"], "--state /nowhere/x: no such folder"),
        (["--request", "4"], "did you mean --requests?"),
    ],
)
def test_mistakes_are_named_with_what_would_be_right(arguments: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("?", r"\?")):
        parse(arguments, False)
