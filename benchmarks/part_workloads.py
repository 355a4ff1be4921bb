"""The second part: four workloads, one client, every system as a user runs it: with the engine's own prefix cache on.

The engine's KV cache is made small, so that a working set can be larger than it in little time. Every system has the
same; `prefix-large` gets the others' host memory on top, which is the same total. Where a tier below the host's memory
is measured, that memory holds less than the larger working sets, so that the tier is needed. `peer` is two hosts that
are asked by turns (benchmarks.hosts).
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.bench import BLOCK_TOKENS, Bench
from benchmarks.cache_results import Answered, WorkloadCell, workload_key
from benchmarks.cache_systems import CacheSystem, Kind, Memory
from benchmarks.hosts import Hosts, hosts_of
from benchmarks.workloads import (
    LARGE,
    MAX_PROMPT_TOKENS,
    NO_SIZE,
    Prompt,
    Situation,
    possible_reuse,
    prompts_of,
    situations,
    working_set_blocks,
)

MAX_TOKENS = 4
SEED = "0"
ENGINE_BLOCKS = 18
HOST_BLOCKS = 300
HOST_BLOCKS_ABOVE_TIER = 36
"""A prompt may take half of it."""
MAX_MODEL_LEN = MAX_PROMPT_TOKENS + BLOCK_TOKENS
_MIB = 1 << 20


def weight(bench: Bench) -> float:
    """In prompt tokens; what is found weighs a tenth."""
    per_system = sum(_weight(prompts_of(situation, bench.corpus, SEED)) for situation in _situations(bench))
    return len(_systems(bench)) * per_system


def measure(bench: Bench) -> None:
    """Every situation of every system that the state does not have yet; each system is started once."""
    for system in _systems(bench):
        missing = [each for each in _situations(bench) if not bench.state.has(_key(system, each))]
        if missing:
            _measure_system(bench, system, missing)
        for each in _situations(bench):
            if each not in missing:
                bench.bar.advance(_weight(prompts_of(each, bench.corpus, SEED)))


def engine_tokens() -> int:
    """What an engine's own cache holds; one block is vLLM's own."""
    return (ENGINE_BLOCKS - 1) * BLOCK_TOKENS


def _measure_system(bench: Bench, system: CacheSystem, missing: list[Situation]) -> None:
    with hosts_of(bench, system, _memory(bench, system)) as hosts:
        for situation in missing:
            prompts = prompts_of(situation, bench.corpus, SEED)
            bench.state.add(_cell(bench, system, hosts, situation, prompts))
            bench.bar.advance(_weight(prompts))


def silent_tier(system: CacheSystem, situation: Situation, answers: Sequence[Answered]) -> str:
    """Why a cell does not show the tier that it is named after: it was needed and gave nothing. Empty if it does."""
    if system.kind is not Kind.BATON or situation.size != LARGE or any(system.tier in each.tiers for each in answers):
        return ""
    return f"not one token from {system.tier}"


def _cell(bench: Bench, system: CacheSystem, hosts: Hosts, situation: Situation, prompts: list[Prompt]) -> WorkloadCell:
    answers = []
    for index, prompt in enumerate(prompts):
        bench.bar.show(f"{system.name}: {situation.name}, {index + 1}/{len(prompts)}")
        answers.append(hosts.ask(index, prompt, MAX_TOKENS))
    return WorkloadCell(
        system=system.name,
        workload=situation.workload,
        reuse=situation.reuse,
        size=situation.size,
        possible=possible_reuse(prompts),
        working_set_bytes=working_set_blocks(prompts) * BLOCK_TOKENS * bench.options.recipe.token_bytes,
        num_active=situation.num_active,
        answers=tuple(answers),
        problem=silent_tier(system, situation, answers),
    )


def _systems(bench: Bench) -> list[CacheSystem]:
    return [system for system in bench.options.systems if system.has_workloads]


def _situations(bench: Bench) -> list[Situation]:
    options = bench.options
    wanted = situations(options.workloads, options.reuse, engine_tokens(), options.requests)
    return [each for each in wanted if each.size in (*options.sizes, NO_SIZE)]


def _memory(bench: Bench, system: CacheSystem) -> Memory:
    block_bytes = BLOCK_TOKENS * bench.options.recipe.token_bytes
    host_blocks = HOST_BLOCKS_ABOVE_TIER if system.is_below_host else HOST_BLOCKS
    return Memory(ENGINE_BLOCKS * block_bytes, -(-host_blocks * block_bytes // _MIB) * _MIB, MAX_MODEL_LEN)


def _key(system: CacheSystem, situation: Situation) -> str:
    return workload_key(system.name, situation.workload, situation.reuse, situation.size)


def _weight(prompts: list[Prompt]) -> float:
    total = sum(map(len, prompts))
    return total * (1.0 - 0.9 * possible_reuse(prompts))
