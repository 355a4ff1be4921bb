"""The measured part: every system and the yardstick by turns, so that whatever drifts drifts for all."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from benchmarks import cores
from benchmarks.bar import Bar
from benchmarks.client import ask, record_of
from benchmarks.memcpy import Yardstick
from benchmarks.results import Copy, Sample, handover_of, problem_of
from benchmarks.systems import MAX_TOKENS, MODEL_NAME, System
from core.clock import Clock

T = TypeVar("T")

FIRST_TOKEN_ID = 16
"""Below are the special tokens."""


class Plan(msgspec.Struct, frozen=True):
    """What is asked of whom. urls: by system."""

    systems: tuple[System, ...]
    urls: Mapping[str, str]
    prompts: tuple[int, ...]
    repeats: int
    vocabulary: int

    def weight(self) -> float:
        """Of everything, warming up included, in prompt tokens."""
        return len(self.systems) * float(sum(self.warm_ups()) + self.repeats * sum(self.prompts))

    def warm_ups(self) -> tuple[int, int]:
        """Prompt lengths that each system computes before it is measured."""
        return max(self.prompts), min(self.prompts)


class Yard(msgspec.Struct, frozen=True):
    """The yardstick, the core that it runs on, and how a prompt is cut into chunks of blocks."""

    yardstick: Yardstick
    core: int
    block_size: int
    chunk_tokens: int

    def measure(self, prompt_tokens: int, repeat: int) -> Copy:
        """Copies as many blocks as a prompt of this length hands over."""
        num_blocks = -(-(prompt_tokens - 1) // self.block_size)
        with cores.only({self.core}):
            times = self.yardstick.measure(num_blocks, max(self.chunk_tokens // self.block_size, 1))
        return Copy(prompt_tokens, repeat, times)


class Measurement:
    """Asks, and keeps what came of it. Prompts are random and never repeat, so no cache can help."""

    def __init__(self, plan: Plan, clock: Clock, bar: Bar, seed: int = 0) -> None:
        self._plan = plan
        self._clock = clock
        self._bar = bar
        self._dice = random.Random(seed)
        self.samples: list[Sample] = []
        self.copies: list[Copy] = []

    def warm_up(self) -> None:
        """Maps memories, connects peers, touches every path."""
        for system in self._plan.systems:
            for tokens in self._plan.warm_ups():
                self._sample(system, tokens, -1)

    def measure(self, yard: Yard | None) -> None:
        """Each prompt length and repeat: the yardstick, then every system, beginning with another one each time."""
        for tokens in self._plan.prompts:
            for repeat in range(self._plan.repeats):
                if yard is not None:
                    self._bar.show(f"{tokens} tokens, {repeat + 1}/{self._plan.repeats}, memcpy")
                    self.copies.append(yard.measure(tokens, repeat))
                for system in turned(self._plan.systems, repeat):
                    self.samples.append(self._sample(system, tokens, repeat))

    def _sample(self, system: System, prompt_tokens: int, repeat: int) -> Sample:
        turn = "warm-up" if repeat < 0 else f"{repeat + 1}/{self._plan.repeats}"
        self._bar.show(f"{prompt_tokens} tokens, {turn}, {system.name}")
        url = self._plan.urls[system.name]
        streamed = ask(url, self._body(prompt_tokens), self._clock)
        record = record_of(url, streamed.request_id, handed_off=bool(system.transport))
        self._bar.advance(prompt_tokens)
        problem = problem_of(record, system.transport, prompt_tokens)
        if not problem and (streamed.num_tokens != MAX_TOKENS or len(streamed.arrivals_s) != MAX_TOKENS):
            problem = f"{streamed.num_tokens} tokens in {len(streamed.arrivals_s)} events instead of {MAX_TOKENS}"
        return Sample(
            system=system.name,
            prompt_tokens=prompt_tokens,
            repeat=repeat,
            first_token_ms=streamed.arrivals_s[0] * 1e3 if streamed.arrivals_s else 0.0,
            gaps_ms=tuple(gap * 1e3 for gap in streamed.gaps_s),
            handover=handover_of(record),
            problem=problem,
            record=record,
        )

    def _body(self, prompt_tokens: int) -> dict[str, Any]:
        prompt = [self._dice.randrange(FIRST_TOKEN_ID, self._plan.vocabulary) for _ in range(prompt_tokens)]
        return {"model": MODEL_NAME, "prompt": prompt, "max_tokens": MAX_TOKENS, "ignore_eos": True, "temperature": 0}


def turned(systems: Sequence[T], repeat: int) -> list[T]:
    """The same circle, entered one place further each time."""
    at = repeat % len(systems)
    return [*systems[at:], *systems[:at]]
