"""The first part: one long prompt, computed and then found, in each tier of each system, beside the barest reads.

    warm up ──▶ cold: every prompt is computed and stored ──▶ forget (all but the tier) ──▶ warm: every prompt again

The engine's own prefix cache is off here (vLLM's own row excepted), so that nothing but the tier can have a prompt.
Prompts are random tokens that share no block.
"""

from __future__ import annotations

import msgspec

from benchmarks import yards
from benchmarks.asking import Asker
from benchmarks.bench import BLOCK_TOKENS, Bench
from benchmarks.cache_results import Answered, Raw, TierCell, tier_key
from benchmarks.cache_systems import CacheSystem, Kind, Memory
from benchmarks.contestant import Contestant

MAX_TOKENS = 6
MARGIN_PROMPTS = 3
"""Warm-ups and some slack, on top of the measured prompts, that the host memory has room for."""

_MIB = 1 << 20


def weight(bench: Bench) -> float:
    """Of the whole part, in prompt tokens that are computed."""
    return len(_systems(bench)) * _system_weight(bench)


def measure(bench: Bench) -> None:
    """Every system that the state does not have yet."""
    for system in _systems(bench):
        if not bench.state.has(tier_key(system.name, bench.options.prompt_tokens)):
            bench.state.add(_cell(bench, system))
        bench.bar.advance(_system_weight(bench))


def found_tokens(prompt_tokens: int) -> int:
    """What of a prompt every cache finds again: whole blocks, and never its last token. Baton may find the rest too."""
    return (prompt_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS


def memory_of(bench: Bench) -> Memory:
    """Every engine and every host memory has room for all prompts."""
    options = bench.options
    wanted = (options.repeats + MARGIN_PROMPTS) * options.prompt_tokens * options.recipe.token_bytes
    num_bytes = -(-wanted // (256 * _MIB)) * 256 * _MIB
    return Memory(num_bytes, num_bytes)


def _systems(bench: Bench) -> list[CacheSystem]:
    return [system for system in bench.options.systems if not system.has_all_memory]


def _system_weight(bench: Bench) -> float:
    return (bench.options.repeats + 2) * float(bench.options.prompt_tokens)


def _cell(bench: Bench, system: CacheSystem) -> TierCell:
    options = bench.options
    tokens, name = options.prompt_tokens, system.name
    prompts = [bench.random_prompt(tokens, f"tiers/{index}") for index in range(-1, options.repeats)]
    with bench.running(system, memory_of(bench), prefix_caching=False) as (contestant, asker):
        cold = []
        for index, prompt in enumerate(prompts):
            bench.bar.show(f"{tokens} tokens, {name}, computed, {index}/{options.repeats}")
            answer = asker.ask(prompt, MAX_TOKENS)
            cold.append(_checked(answer, _miss(answer)))
        bench.bar.show(f"{tokens} tokens, {name}, waiting until all is stored")
        contestant.settle()
        contestant.forget()
        warm = _warm(bench, contestant, asker, prompts)
        raws = _raws(bench, system, warm[-1])
    return TierCell(name, tokens, tuple(cold[1:]), tuple(warm[1:]), raws)


def _warm(bench: Bench, contestant: Contestant, asker: Asker, prompts: list[list[int]]) -> list[Answered]:
    """The first prompt only warms up; behind an engine that was started anew, so does a short one before it."""
    options, system = bench.options, contestant.system
    if system.is_below_host:
        asker.ask(bench.random_prompt(BLOCK_TOKENS * 4, "tiers/warm-up"), MAX_TOKENS)
    warm = []
    for index, prompt in enumerate(prompts):
        bench.bar.show(f"{options.prompt_tokens} tokens, {system.name}, found, {index}/{options.repeats}")
        answer = asker.ask(prompt, MAX_TOKENS)
        warm.append(_checked(answer, _wrong_source(system, answer)))
    return warm


def _miss(answer: Answered) -> str:
    """Why an answer that had to be computed was not."""
    found = answer.from_engine + answer.from_outside
    return f"{found} tokens of a new prompt were found" if found else ""


def _wrong_source(system: CacheSystem, answer: Answered) -> str:
    """Why an answer did not come from where the system claims to have it."""
    wanted = found_tokens(answer.prompt_tokens)
    if not system.tier:
        return _miss(answer)
    if system.tier == "engine":
        return "" if answer.from_engine == wanted else f"{answer.from_engine} of {wanted} tokens found by the engine"
    if answer.from_outside < wanted or answer.from_engine:
        return f"{answer.from_outside} of {wanted} tokens from outside, {answer.from_engine} by the engine"
    if system.kind is Kind.BATON and answer.tiers != {system.tier: answer.from_outside}:
        told = ", ".join(f"{tokens} from {tier}" for tier, tokens in answer.tiers.items()) or "nothing told"
        return f"{told}, instead of {answer.from_outside} from {system.tier}"
    return ""


def _checked(answer: Answered, problem: str) -> Answered:
    return msgspec.structs.replace(answer, problem=answer.problem or problem)


def _raws(bench: Bench, system: CacheSystem, answer: Answered) -> tuple[Raw, ...]:
    """The yardsticks of a system's tier, a moment after it was measured: of as many blocks as it has loaded."""
    if system.tier in ("", "engine"):
        return ()
    options, folder = bench.options, bench.site.disk
    layers = options.recipe.shape.num_layers
    block_bytes = options.recipe.token_bytes * BLOCK_TOKENS // layers
    num_blocks = -(-answer.load_bytes // (block_bytes * layers)) or found_tokens(options.prompt_tokens) // BLOCK_TOKENS
    prompt = yards.Prompt(num_blocks, layers, block_bytes)
    try:
        raws = [yards.memcpy(prompt, bench.clock, bench.machine.cache_bytes)]
        if system.tier == "disk":
            raws.append(yards.disk(prompt, bench.clock, folder))
        elif system.tier == "redis":
            raws.append(yards.redis(prompt, bench.clock, bench.site.folder.path))
        elif system.tier == "peer":
            raws.append(yards.peer(prompt, bench.clock))
    finally:
        prompt.close()
    return tuple(raws)
