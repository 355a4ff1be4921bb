"""The README is true: its tree is the tree, its table is made from the tests, its scripts exist."""

from __future__ import annotations

import ast
import os
import re
import subprocess

import pytest

from tests.readme import ROOT, commands, replace_section, section

SUPPORTED: list[tuple[str, str, str]] = [
    ("Any xPyD, several of each role", "yes", "engine/test_clients.py::test_two_of_each_serve_and_each_serves"),
    ("`0PyD`: plain vLLM behind the proxy", "yes", "engine/test_exact.py::test_cold_caches_one_at_a_time"),
    ("Chat and completions, streamed and not", "yes", "engine/test_exact.py::test_cold_caches_one_at_a_time"),
    ("Shared memory (`shm`) and TCP (`zmq`)", "yes", "engine/test_exact.py::test_cold_caches_one_at_a_time"),
    ("NIXL (`nixl`), in host memory", "yes", "transport/test_nixl.py"),
    ("UCX (`ucx`, through ucxx), in host memory, on trusted networks", "over TCP", "transport/test_ucx.py"),
    (
        "`cuda_ipc`, NIXL and UCX in GPU memory",
        "written, never measured, never chosen by itself",
        "transport/test_cuda_ipc.py",
    ),
    ("Chunked prefill, prefix caching", "yes", "engine/test_exact.py::test_one_side_warm"),
    (
        "float32 exact, bfloat16 within bounds",
        "yes",
        "engine/test_bfloat16.py::test_answers_part_rarely_and_only_at_near_ties",
    ),
    ("Seeds, stop, logprobs, structured output, usage", "yes", "engine/test_features.py::test_equal_to_plain_vllm"),
    (
        "A seed on a CPU with a prompt of several steps, which ends vLLM 0.32 by itself",
        "yes",
        "engine/test_features.py::test_equal_to_plain_vllm",
    ),
    ("`n` > 1, several prompts, echo", "decode instance alone", "proxy/test_split.py"),
    ("A prefill instance dies at any moment", "yes", "engine/test_recovers.py::test_the_prefill_instance_dies"),
    ("A byte flips in transit", "yes", "engine/test_recovers.py::test_a_byte_is_flipped_in_transit"),
    ("The fastest transport is taken", "yes", "engine/test_paths.py::test_a_slow_shm_loses_to_zmq"),
    (
        "A path breaks under a hand-off: the next best is taken",
        "yes",
        "engine/test_paths.py::test_a_path_that_fails_in_mid_push_costs_no_request",
    ),
    ("A peer hangs", "yes", "engine/test_overload.py::test_a_stopped_prefill_instance_with_64_prompts_waiting"),
    (
        "Instances join by hand, over TCP (tested on one host)",
        "yes",
        "engine/test_join.py::test_the_readmes_lines_by_hand",
    ),
    (
        "KV cache in host memory, shared by all instances",
        "yes",
        "engine/test_cache.py::test_all_instances_share_what_one_computed_and_its_death_costs_nothing",
    ),
    (
        "Loads beside the forward pass; a step with a bad block is thrown away",
        "yes",
        "engine/test_cache_in_step.py::test_what_was_computed_with_a_bad_block_is_thrown_away_and_nobody_else_finds_it",
    ),
    (
        "KV cache on disk, across a restart of everything",
        "yes",
        "engine/test_cache.py::test_everything_restarted_the_disk_gives_it_back",
    ),
    (
        "Chats, shared documents, summaries, code: exact from every tier",
        "yes",
        "engine/test_cache_exact.py::test_everything_new_but_one_lower_tier",
    ),
    (
        "Preemption and eviction at concurrency 16, clients that leave",
        "yes",
        "engine/test_cache_exact.py::test_too_little_memory_everywhere",
    ),
    ("KV cache in Redis, one of two servers dying", "yes", "kvcache/test_redis.py"),
    ("Other hosts' arenas (tested on one host)", "yes", "engine/test_peers.py"),
    ("Object stores (S3 protocol, files)", "yes", "kvcache/test_object_tier.py"),
    ("Codecs: zstd, lz4 exact; fp8, int8, int4 within their stated error", "yes", "kvcache/test_codecs.py"),
    ("Named contexts, templates, `BatonClient`", "yes", "engine/test_contexts.py"),
    (
        "The cache server dies, hangs, or its memory is flipped",
        "yes",
        "engine/test_cache.py::test_a_flipped_bit_in_the_arena_is_computed_anew_and_counted",
    ),
    ("Official `openai` client, `vllm bench serve`", "yes", "engine/test_clients.py::test_the_official_client"),
    (
        "Encrypted control plane and `zmq`, members only",
        "yes, with `--keys`",
        "engine/test_keys.py::test_a_handoff_by_zmq_is_exact_and_with_keys_nothing_of_it_can_be_read",
    ),
    (
        "A decode instance restarts, its old memory is let go",
        "yes",
        "engine/test_restart.py::test_the_old_memory_is_gone_from_the_prefill_instance_and_the_next_hand_off_works",
    ),
    (
        "Tensor parallel sizes that differ (1 → 2, 2 → 1), or are equal",
        "yes",
        "engine/test_tensor_parallel.py::test_one_rank_fills_two",
    ),
    (
        "The cache behind tensor-parallel instances",
        "yes; one size finds what that size stored",
        "engine/test_cache_ranks.py",
    ),
    ("Pipeline, data parallel above 1", "refused by name", "cluster/test_preflight.py"),
    ("Speculative decoding, quantised KV cache", "refused by name", "cluster/test_preflight.py"),
    ("Sliding-window, Mamba and hybrid models", "refused by name", "cluster/test_preflight.py"),
    (
        "Hand-off and cache with the KV cache on a GPU",
        "written, never run on one; `--transport` must name the path",
        "engine/test_device.py",
    ),
    ("An answer cut off by its decode instance's death", "ends with an error event", "proxy/test_flow.py"),
]


def test_the_support_table_is_made_from_tests_that_exist() -> None:
    rows = ["| what | supported | test |", "| --- | --- | --- |"]
    for what, answer, node in SUPPORTED:
        file, _, function = node.partition("::")
        path = ROOT / "tests" / file
        assert path.exists(), f"{what}: {node} does not exist"
        names = [n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
        assert not function or function in names, f"{what}: {node} does not exist"
        rows.append(f"| {what} | {answer} | `tests/{node}` |")
    table = "\n".join(rows) + "\n"
    if os.environ.get("BATON_DRAW"):
        replace_section("support", table)
    assert section("support") == table, "BATON_DRAW=1 renews it"


def test_the_tree_is_the_tree() -> None:
    told = set(re.findall(r"^(\S+)", section("tree").replace("```", ""), re.M))
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not listed:
        pytest.skip("not a git checkout: cannot tell which folders are ours")
    folders = {path.split("/")[0] + "/" for path in listed if "/" in path and not path.startswith(".")}
    assert told == folders | {"baton.py"}


def test_every_script_that_the_readme_names_exists_and_runs() -> None:
    named = set(re.findall(r"scripts/[a-z_]+", (ROOT / "README.md").read_text()))
    assert named >= {"scripts/demo", "scripts/test", "scripts/launch"}
    for name in named:
        assert os.access(ROOT / name, os.X_OK), f"{name} cannot be run"


def test_every_command_of_the_readme_is_run_by_some_test() -> None:
    """curl: test_clients; launch, demo, cache, doctor: tests/cluster; instance, vllm serve: test_join; keys:
    test_command."""
    known = (
        "scripts/launch ",
        "curl ",
        "baton instance ",
        "baton cache ",
        "baton keys ",
        "baton doctor",
        "vllm serve ",
    )
    for command in commands():
        assert command.startswith(known), f"no test runs {command!r}"
