"""What every part of `baton bench cache` is given: options, ground, finished cells, bar and clock."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from benchmarks.asking import Asker
from benchmarks.bar import Bar
from benchmarks.cache_options import CacheOptions
from benchmarks.cache_results import State
from benchmarks.cache_systems import CacheSystem, Kind, Memory
from benchmarks.contestant import Contestant, contestant
from benchmarks.corpus import Corpus
from benchmarks.machine import Machine
from benchmarks.measure import FIRST_TOKEN_ID
from benchmarks.site import Site
from cluster.bundled import BUNDLED_FOLDER
from core.clock import Clock

BLOCK_TOKENS = 128
"""vLLM's block size on a CPU, and LMCache's chunk here."""
FILL_TOKENS = 512


class Bench(msgspec.Struct, frozen=True):
    """One run."""

    options: CacheOptions
    site: Site
    state: State
    bar: Bar
    clock: Clock
    machine: Machine
    corpus: Corpus

    def random_prompt(self, num_tokens: int, seed: str) -> list[int]:
        """Tokens that no other seed shares a block with."""
        dice = random.Random(seed)
        vocabulary = vocabulary_size()
        return [dice.randrange(FIRST_TOKEN_ID, vocabulary) for _ in range(num_tokens)]

    @contextmanager
    def running(
        self, system: CacheSystem, memory: Memory, *, prefix_caching: bool
    ) -> Iterator[tuple[Contestant, Asker]]:
        """A system that can be asked, its host memory touched once: first touches are slow for everybody, and Baton's
        server has done them at its start."""
        self.bar.show(f"starting {system.name}")
        with contestant(system, self.site, memory, prefix_caching=prefix_caching) as running:
            asker = Asker(running, self.clock)
            if system.kind is Kind.LMCACHE:
                self._fill(asker, memory, system.name)
            yield running, asker

    def _fill(self, asker: Asker, memory: Memory, name: str) -> None:
        num_prompts = -(-memory.host_bytes // (self.options.recipe.token_bytes * FILL_TOKENS))
        for index in range(num_prompts):
            self.bar.show(f"{name}: touching its memory, {index + 1}/{num_prompts}")
            asker.ask(self.random_prompt(FILL_TOKENS, f"fill/{index}"), 1)


def vocabulary_size() -> int:
    """Of the bundled tokenizer, which every model here has."""
    return int(json.loads((BUNDLED_FOLDER / "config.json").read_text())["vocab_size"])
