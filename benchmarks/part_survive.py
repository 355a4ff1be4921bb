"""The fifth part: an engine stores, is killed with all its processes, and another one finds what it stored."""

from __future__ import annotations

from benchmarks.bench import Bench
from benchmarks.cache_results import SurviveCell, survive_key
from benchmarks.cache_systems import CacheSystem, Kind, Memory
from benchmarks.part_tiers import MAX_TOKENS, memory_of

PROMPTS = 3


def weight(bench: Bench) -> float:
    """In prompt tokens."""
    return len(_systems(bench)) * _system_weight(bench)


def measure(bench: Bench) -> None:
    """Every system of Baton's."""
    for system in _systems(bench):
        if not bench.state.has(survive_key(system.name)):
            bench.state.add(_cell(bench, system))
        bench.bar.advance(_system_weight(bench))


def _systems(bench: Bench) -> list[CacheSystem]:
    return [system for system in bench.options.systems if system.kind is Kind.BATON and system.tier == "host"]


def _system_weight(bench: Bench) -> float:
    return (PROMPTS + 1) * float(bench.options.prompt_tokens)


def _cell(bench: Bench, system: CacheSystem) -> SurviveCell:
    tokens = bench.options.prompt_tokens
    prompts = [bench.random_prompt(tokens, f"survive/{index}") for index in range(PROMPTS)]
    memory: Memory = memory_of(bench)
    with bench.running(system, memory, prefix_caching=True) as (contestant, asker):
        for prompt in prompts:
            bench.bar.show(f"{system.name}: storing before the kill")
            asker.ask(prompt, MAX_TOKENS)
        contestant.settle()
        contestant.kill_engine()
        asker.ask(bench.random_prompt(512, "survive/warm-up"), MAX_TOKENS)
        bench.bar.show(f"{system.name}: asking after the kill")
        answers = [asker.ask(prompt, MAX_TOKENS) for prompt in prompts]
    return SurviveCell(system.name, tuple(answers))
