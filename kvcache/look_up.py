"""One request's question to the cache server: what came of it, and what is held for the request meanwhile.

    ask ──▶ ASKED ── answer ──▶ KNOWN ── load ──▶ LOADING ── loaded ──▶ OVER
              │ ├─ a partial block may follow ──▶ PARTIAL ── answer, or budget spent ──▶ KNOWN
              │ └─ some, more is coming ──▶ COMING ── it came, or would take longer than computing ──▶ KNOWN
              └─ budget spent, server gone ──────────────────────────────▶ OVER   (compute)

Held at the server are pins, until `end`, and places that the request may fill. An answer that nobody waits for any more
is left with the client, which gives back what it brings.

Threads: the engine's thread; what is given back without it, on the client's.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from core.clock import Clock
from kvcache import wire
from kvcache.breaker import Breaker
from kvcache.client import Answer, CacheClient
from kvcache.keys import BlockKey, join_keys
from kvcache.orders import Piece
from kvcache.pace import Pace
from kvcache.prompt import KeyedPrompt

COMING_S = 2.0
"""How long blocks of other tiers may take while nobody knows how long computing them would."""

BUDGET_SHARE = 0.1
COMING_SHARE = 0.5
"""Of the time in which a request must be served: for an answer, and for blocks of other tiers."""


class Stage(enum.Enum):
    """Where a request's look-up stands."""

    ASKED = "asked"
    COMING = "coming"
    PARTIAL = "partial"
    KNOWN = "known"
    LOADING = "loading"
    OVER = "over"


@dataclass
class Desk:
    """What all look-ups of an instance share. block_size: in tokens; budget_s: for an answer."""

    client: CacheClient
    clock: Clock
    breaker: Breaker
    pace: Pace
    block_size: int
    budget_s: float


class _Partial(NamedTuple):
    """A partial block that follows what was found."""

    key: BlockKey
    slot: wire.Slot
    num_tokens: int


class LookUp:
    """slots: of the prompt's first blocks that were found, in order; arena_id: where they lie."""

    def __init__(self, desk: Desk, prompt: KeyedPrompt, number: int, *, reserves: bool) -> None:
        self._desk = desk
        self._prompt = prompt
        self._number = number
        self._reserves = reserves
        self._epoch = desk.client.epoch
        self._asked_s = desk.clock.monotonic_s()
        self._grants: list[wire.Grant] = []
        self._num_coming = 0
        self._partial_number = 0
        self._partial: _Partial | None = None
        self.slots: list[wire.Slot] = []
        self.arena_id = ""
        self.stage = Stage.ASKED

    @classmethod
    def ask(cls, desk: Desk, prompt: KeyedPrompt, *, reserve: bool) -> LookUp | None:
        """None if nobody can be asked. reserve: the request will compute and store the blocks that are not there."""
        keys, partials = join_keys(prompt.keys), prompt.partials
        number = desk.client.search(
            keys, reserve=reserve, tenant=prompt.tenant, partial=partials.last, root=partials.root
        )
        return cls(desk, prompt, number, reserves=reserve) if number else None

    def hear(self, wait_s: float = 0.0) -> bool:
        """Whether the question has ended, with an answer or without. wait_s: for which to wait for an answer."""
        if self.stage is Stage.PARTIAL:
            return self._hear_partial(wait_s)
        if self.stage not in (Stage.ASKED, Stage.COMING):
            return True
        answer = self._desk.client.take(self._number, wait_s if self.stage is Stage.ASKED else 0.0)
        if isinstance(answer, wire.Found):
            self._take(answer)
            if answer.has_partial and self._ask_partial():
                return self._hear_partial(wait_s)
            return not answer.coming
        if self._is_served() and self._desk.clock.monotonic_s() - self._asked_s < self._patience_s():
            return False
        self._go_without()
        return True

    def num_tokens(self, found_tokens: int, num_prompt: int) -> int:
        """How many tokens after `found_tokens` can be loaded; at most all but the last of the prompt."""
        block_size = self._desk.block_size
        end_tokens = len(self.slots) * block_size
        if self._partial is not None:
            with_partial = end_tokens + self._partial.num_tokens
            gained = min(with_partial, num_prompt - 1) - max(found_tokens, end_tokens)
            if gained > 0 and self._desk.pace.is_worth_a_block(gained, block_size):
                end_tokens = with_partial
        return max(min(end_tokens, num_prompt - 1) - found_tokens, 0)

    def pieces(self, block_ids: Sequence[int], first_token: int, end_token: int) -> list[Piece]:
        """The blocks with tokens [first, end)."""
        size = self._desk.block_size
        slots = list(zip(self._prompt.keys, self.slots, strict=False))
        if self._partial is not None:
            slots.append((self._partial.key, self._partial.slot))
        pieces = []
        for index in range(first_token // size, -(-end_token // size)):
            key, slot = slots[index]
            num_tokens = min(end_token, (index + 1) * size) - max(first_token, index * size)
            pieces.append(Piece(block_ids[index], slot.offset, key, slot.digest, slot.tier, num_tokens))
        return pieces

    def take_grants(self) -> list[tuple[BlockKey, int]]:
        """(key, offset) of blocks that the request may store, once."""
        if not self._is_current():
            return []
        granted, self._grants = self._grants, []
        return [(self._key(grant.index), grant.offset) for grant in granted]

    def end(self) -> None:
        """Nothing needs to stay pinned."""
        self.stage = Stage.OVER
        if self._is_current():
            self._desk.client.send(wire.Release(self._number))
            if self._partial_number:
                self._desk.client.send(wire.Release(self._partial_number))

    def leave(self) -> None:
        """Its request has ended, and nothing is being loaded."""
        if not self._is_current():
            return
        if self.stage in (Stage.ASKED, Stage.COMING):
            self._desk.client.leave(self._number, self._give_back_all)
            return
        if self.stage is Stage.PARTIAL:
            self._desk.client.leave(self._partial_number, self._give_back_end)
        if self.stage in (Stage.KNOWN, Stage.PARTIAL):
            self.end()
        self._abandon(self._grants)

    # ---- inside ----

    def _take(self, answer: wire.Found) -> None:
        """What was found: full blocks, and if it is one more, the prompt's end."""
        self._desk.breaker.good()
        num_keys, partials = len(self._prompt.keys), self._prompt.partials
        self.slots = list(answer.slots[:num_keys])
        if len(answer.slots) > num_keys:
            self._partial = _Partial(partials.last, answer.slots[num_keys], partials.num_last)
        self._grants = list(answer.grants)
        self.arena_id, self._num_coming = self._desk.client.arena_id, answer.coming
        self.stage = Stage.COMING if answer.coming else Stage.KNOWN

    def _go_without(self) -> None:
        """The answer takes too long, or will never come; with what is known."""
        was_coming = self.stage is Stage.COMING
        self.stage = Stage.KNOWN if was_coming else Stage.OVER
        if not self._is_served():
            return
        if was_coming:  # pinned under the same number, so `end` gives that back
            self._desk.client.leave(self._number, self._give_back_places)
        else:
            self._desk.client.leave(self._number, self._give_back_all)
            self._desk.breaker.bad()

    def _ask_partial(self) -> bool:
        num_blocks, prompt = len(self.slots), self._prompt
        keys = prompt.partials.after(num_blocks)
        is_end = num_blocks == len(prompt.keys) and keys[:1] == [prompt.partials.last]
        before = prompt.partials.before(num_blocks) if is_end and self._reserves else b""
        number = self._desk.client.search_partial(join_keys(keys), before, prompt.tenant) if keys else 0
        if number:
            self._partial_number, self._asked_s = number, self._desk.clock.monotonic_s()
            self.stage = Stage.PARTIAL
        return bool(number)

    def _hear_partial(self, wait_s: float) -> bool:
        """Whether that question has ended; without an answer the full blocks are used alone."""
        client, prompt, num_blocks = self._desk.client, self._prompt, len(self.slots)
        answer = client.take(self._partial_number, wait_s)
        if isinstance(answer, wire.Found):
            keys = prompt.partials.after(num_blocks)
            self._grants += [wire.Grant(len(prompt.keys), grant.offset) for grant in answer.grants]
            if answer.slots and answer.index < len(keys):
                num_tokens = prompt.partials.num_tokens(num_blocks, answer.index)
                self._partial = _Partial(keys[answer.index], answer.slots[0], num_tokens)
        elif self._is_served():
            if self._desk.clock.monotonic_s() - self._asked_s < self._patience_s():
                return False
            self._desk.breaker.bad()
            client.send(wire.Release(self._partial_number))
            client.leave(self._partial_number, self._give_back_end)
        self.stage = Stage.KNOWN
        return True

    def _give_back_all(self, answer: Answer) -> bool:
        """Pins and places. False if there is another answer to come."""
        if not self._give_back_places(answer):
            return False
        self._desk.client.send(wire.Release(self._number))
        return True

    def _give_back_places(self, answer: Answer) -> bool:
        """False if there is another answer to come."""
        if isinstance(answer, wire.Found) and answer.coming:
            return False
        self._desk.breaker.good()
        self._abandon(answer.grants)
        return True

    def _give_back_end(self, answer: Answer) -> bool:
        """The place for the prompt's end; its pin was given back already."""
        if answer.grants:
            self._desk.client.send(wire.Abandon(self._prompt.partials.last))
        return True

    def _abandon(self, grants: Iterable[wire.Grant]) -> None:
        """Gives back places that nobody will write."""
        keys = join_keys(self._key(grant.index) for grant in grants)
        if keys:
            self._desk.client.send(wire.Abandon(keys))

    def _key(self, index: int) -> BlockKey:
        """Of a granted place: one more than the full blocks is the prompt's end."""
        return self._prompt.keys[index] if index < len(self._prompt.keys) else self._prompt.partials.last

    def _patience_s(self) -> float:
        desk, within_s = self._desk, self._prompt.within_s
        if self.stage is not Stage.COMING:
            return min(desk.budget_s, within_s * BUDGET_SHARE)
        compute_s = desk.pace.compute_s(self._num_coming * desk.block_size)
        patience_s = desk.budget_s + (COMING_S if compute_s is None else compute_s)
        return min(patience_s, within_s * COMING_SHARE)

    def _is_current(self) -> bool:
        """Whether what is held was held under this connection."""
        return self._epoch == self._desk.client.epoch

    def _is_served(self) -> bool:
        """Whether an answer may still come."""
        return self._is_current() and self._desk.client.is_connected
