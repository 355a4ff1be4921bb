"""The third part: what a cache costs where it gives nothing. Two engines at once, asked by turns, so that what drifts
drifts for both: vLLM with its own prefix cache, and the same with a cache behind it.

    no reuse      every prompt is new: the cache only stores
    fits engine   every prompt's whole blocks are in the engine's own cache: the cache can add the rest at most
"""

from __future__ import annotations

from benchmarks.asking import Asker
from benchmarks.bench import Bench
from benchmarks.cache_results import Answered, PairCell, pair_key
from benchmarks.cache_systems import SYSTEMS, CacheSystem, Kind, Memory
from benchmarks.contestant import contestant
from benchmarks.part_tiers import found_tokens

PROMPT_TOKENS = 1000
MAX_TOKENS = 4
NO_REUSE = "no reuse"
FITS_ENGINE = "fits engine"
SITUATIONS = (NO_REUSE, FITS_ENGINE)
REFERENCE = "prefix"
_FEW_PROMPTS = 4
_MIB = 1 << 20


def weight(bench: Bench) -> float:
    """In prompt tokens, both engines."""
    return len(_systems(bench)) * _system_weight(bench)


def measure(bench: Bench) -> None:
    """Every system with a cache in host memory."""
    for system in _systems(bench):
        if not all(bench.state.has(pair_key(system.name, situation)) for situation in SITUATIONS):
            _measure_system(bench, system)
        bench.bar.advance(_system_weight(bench))


def _systems(bench: Bench) -> list[CacheSystem]:
    return [each for each in bench.options.systems if each.kind is not Kind.NOBODY and each.tier == "host"]


def _system_weight(bench: Bench) -> float:
    return 2.0 * (bench.options.pairs + _FEW_PROMPTS) * PROMPT_TOKENS


def _measure_system(bench: Bench, system: CacheSystem) -> None:
    memory = Memory(512 * _MIB, 512 * _MIB)
    with (
        contestant(SYSTEMS[REFERENCE], bench.site, memory, prefix_caching=True) as without,
        bench.running(system, memory, prefix_caching=True) as (_, asker),
    ):
        both = Asker(without, bench.clock), asker
        for each in both:
            each.ask(bench.random_prompt(PROMPT_TOKENS, "overhead/warm-up"), MAX_TOKENS)
        new = [bench.random_prompt(PROMPT_TOKENS, f"overhead/{index}") for index in range(bench.options.pairs)]
        bench.state.add(_cell(bench, system, NO_REUSE, both, new))
        few = new[-_FEW_PROMPTS:]
        again = [few[index % len(few)] for index in range(bench.options.pairs)]
        bench.state.add(_cell(bench, system, FITS_ENGINE, both, again))


def _cell(
    bench: Bench, system: CacheSystem, situation: str, both: tuple[Asker, Asker], prompts: list[list[int]]
) -> PairCell:
    first, done, problem = [], [], ""
    for index, prompt in enumerate(prompts):
        bench.bar.show(f"overhead of {system.name}, {situation}, {index + 1}/{len(prompts)}")
        order = (0, 1) if index % 2 == 0 else (1, 0)
        answers: dict[int, Answered] = {which: both[which].ask(prompt, MAX_TOKENS) for which in order}
        first.append((answers[0].first_token_ms, answers[1].first_token_ms))
        done.append((answers[0].done_ms, answers[1].done_ms))
        problem = problem or answers[0].problem or answers[1].problem or _mismatch(situation, answers)
    return PairCell(system.name, situation, tuple(first), tuple(done), problem)


def _mismatch(situation: str, answers: dict[int, Answered]) -> str:
    """Why a pair is not what the situation says."""
    for answer in answers.values():
        if situation == NO_REUSE and answer.computed != answer.prompt_tokens:
            return f"{answer.prompt_tokens - answer.computed} tokens of a new prompt were found"
        if situation == FITS_ENGINE and answer.from_engine < found_tokens(answer.prompt_tokens):
            return f"only {answer.from_engine} tokens came from the engine's own cache"
    return ""
