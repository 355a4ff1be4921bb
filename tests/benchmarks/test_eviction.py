"""The replay of a trace counts prefixes, not blocks, and a file that is no trace is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.eviction import hit_rate, read_trace
from core.errors import ConfigError
from kvcache.policy import POLICIES


@pytest.mark.parametrize("policy", POLICIES)
def test_a_block_counts_only_behind_its_whole_prefix(policy: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0, "hash_ids": [1, 2, 3]}\n{"hash_ids": [1, 2, 4]}\n{"hash_ids": [9, 2, 3]}\n')
    requests = read_trace(trace)
    assert hit_rate(requests, policy, 100) == 2 / 9
    assert hit_rate(requests, policy, 1) <= 2 / 9, "also where nothing fits"


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trace.jsonl").write_text("timestamp,tokens\n")
    with pytest.raises(ConfigError, match="not a trace of block hashes"):
        read_trace(tmp_path / "trace.jsonl")
