"""Four workloads from real text: which prompts are asked in which order. Pure: text, a seed and numbers decide.

A family is what shares a beginning: one conversation, one set of documents, one document, one file being written. Some
families are active at a time and are asked by turns; one that has no request left gives way to the next.

    multi-turn   question ┃ answer ┃ question ...     grows with each turn, answers are the text's own
    rag          documents ┃ question                 the same documents, another question each time
    summary      document ┃ instruction               one long document, another instruction each time
    code         context ┃ file up to the cursor      grows with each completion

How much is reused follows from how many requests a family has: the number is chosen so that the share of prompt tokens
that a cache without end would find, in whole blocks, is as near as possible to what was asked for. At 0 every family
has one request.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import msgspec

from benchmarks.corpus import Corpus

BLOCK_TOKENS = 128
MAX_PROMPT_TOKENS = 1664
NO_SIZE = "none"
"""Of the working set where nothing is reused."""
LARGE = "large"
MOST_REQUESTS = 40
"""Of one family."""

Prompt = tuple[int, ...]


class Situation(msgspec.Struct, frozen=True):
    """reuse: percent of prompt tokens. size: `small` if the active families fit the engine's own cache, else `large`.
    num_active: families at a time. num_requests: at least so many."""

    workload: str
    reuse: int
    size: str
    num_active: int
    num_requests: int

    @property
    def name(self) -> str:
        return f"{self.workload}, {self.reuse} %, {self.size}"


class _Growing(msgspec.Struct, frozen=True):
    """A family whose prompts grow from `first` to `last` tokens."""

    first: int
    last: int
    is_code: bool = False

    def family(self, num_requests: int, corpus: Corpus, dice: random.Random) -> list[Prompt]:
        draw = corpus.code if self.is_code else corpus.prose
        whole = draw(self.last, dice)
        if num_requests == 1:
            return [tuple(whole)]
        step = (self.last - self.first) / (num_requests - 1)
        return [tuple(whole[: round(self.first + index * step)]) for index in range(num_requests)]


class _Shared(msgspec.Struct, frozen=True):
    """A family of prompts with the same `num_parts` passages, `shared` tokens in all, and `own` tokens each."""

    num_parts: int
    shared: int
    own: int

    def family(self, num_requests: int, corpus: Corpus, dice: random.Random) -> list[Prompt]:
        parts = [corpus.prose(self.shared // self.num_parts, dice) for _ in range(self.num_parts)]
        shared = [token for part in parts for token in part]
        return [tuple(shared + corpus.prose(self.own, dice)) for _ in range(num_requests)]


_KINDS: dict[str, _Growing | _Shared] = {
    "multi-turn": _Growing(first=512, last=1536),
    "rag": _Shared(num_parts=3, shared=768, own=32),
    "summary": _Shared(num_parts=1, shared=1536, own=24),
    "code": _Growing(first=1024, last=1536, is_code=True),
}
WORKLOADS = tuple(_KINDS)


def situations(
    workloads: Sequence[str], reuse: Sequence[int], engine_tokens: int, num_requests: int
) -> list[Situation]:
    """Without reuse there is one, of no size. The last one, with most reuse and more than the engine's cache holds, has
    all requests, the others two fifths."""
    result = []
    for workload in workloads:
        few = num_requests * 2 // 5
        for share in sorted(reuse):
            if not share:
                result.append(Situation(workload, 0, NO_SIZE, 1, few))
                continue
            largest = longest(workload)
            small = max(engine_tokens // (2 * largest), 1)
            large = -(-engine_tokens * 5 // (2 * largest))
            result.append(Situation(workload, share, "small", small, few))
            result.append(Situation(workload, share, LARGE, large, num_requests if share == max(reuse) else few))
    return result


def longest(workload: str) -> int:
    """Tokens of a workload's longest prompt."""
    kind = _KINDS[workload]
    return kind.last if isinstance(kind, _Growing) else kind.shared + kind.own


def prompts_of(situation: Situation, corpus: Corpus, seed: str) -> list[Prompt]:
    """In the order in which they are asked."""
    dice = random.Random(f"{seed}/{situation.workload}/{situation.reuse}/{situation.size}")
    kind, per_family = _KINDS[situation.workload], requests_per_family(situation.workload, situation.reuse)
    wave = per_family * situation.num_active
    num_waves = max(-(-situation.num_requests // wave), 1)
    families = [kind.family(per_family, corpus, dice) for _ in range(situation.num_active * num_waves)]
    return _by_turns(families, situation.num_active, dice)


def requests_per_family(workload: str, reuse: int) -> int:
    """The number with which a family comes nearest to this reuse."""
    if not reuse:
        return 1
    make = _lengths(_KINDS[workload])
    return min(range(1, MOST_REQUESTS + 1), key=lambda count: abs(_share(make(count)) - reuse / 100))


def possible_reuse(prompts: Sequence[Prompt], block_tokens: int = BLOCK_TOKENS) -> float:
    """The share of prompt tokens that a cache without end finds: whole blocks, and never a prompt's last token."""
    seen: set[int] = set()
    found = 0
    for prompt in prompts:
        is_known = True
        for block in _chain(prompt, block_tokens):
            is_known = is_known and block[0] in seen
            found += block_tokens if is_known and block[1] < len(prompt) else 0
            seen.add(block[0])
    return found / sum(map(len, prompts))


def working_set_blocks(prompts: Sequence[Prompt], block_tokens: int = BLOCK_TOKENS) -> int:
    """How many different blocks all prompts have."""
    return len({block for prompt in prompts for block, _ in _chain(prompt, block_tokens)})


def _chain(prompt: Prompt, block_tokens: int) -> list[tuple[int, int]]:
    """Each full block's chained hash, and where the block ends."""
    result, chained = [], 0
    for end in range(block_tokens, len(prompt) + 1, block_tokens):
        chained = hash((chained, prompt[end - block_tokens : end]))
        result.append((chained, end))
    return result


def _by_turns(families: list[list[Prompt]], num_active: int, dice: random.Random) -> list[Prompt]:
    """Each round asks every active family once, in an order of its own."""
    waiting = [list(family) for family in families]
    active, rest = waiting[:num_active], waiting[num_active:]
    result: list[Prompt] = []
    while active:
        dice.shuffle(active)
        result += [family.pop(0) for family in active]
        ended = [family for family in active if not family]
        active = [family for family in active if family] + rest[: len(ended)]
        rest = rest[len(ended) :]
    return result


def _lengths(kind: _Growing | _Shared) -> Callable[[int], list[tuple[int, int]]]:
    """For a number of requests: each prompt's length, and how many of its tokens the one before it had."""
    if isinstance(kind, _Shared):
        return lambda count: [(kind.shared + kind.own, kind.shared if index else 0) for index in range(count)]

    def growing(count: int) -> list[tuple[int, int]]:
        if count == 1:
            return [(kind.last, 0)]
        step = (kind.last - kind.first) / (count - 1)
        lengths = [round(kind.first + index * step) for index in range(count)]
        return list(zip(lengths, [0, *lengths[:-1]], strict=True))

    return growing


def _share(lengths: Sequence[tuple[int, int]]) -> float:
    """In whole blocks."""
    found = sum(min(had, length - 1) // BLOCK_TOKENS * BLOCK_TOKENS for length, had in lengths)
    return found / sum(length for length, _ in lengths)
