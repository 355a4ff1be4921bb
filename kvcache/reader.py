"""What a request takes from the cache, decided beside the engine's scheduler.

    arrive ──▶ ASKED ── answer ──▶ KNOWN ── load ──▶ LOADING ── loaded ──▶ OVER
                 │ ├─ a partial block may follow ──▶ PARTIAL ── answer, or budget spent ──▶ KNOWN
                 │ └─ some, more is coming ──▶ COMING ── it came, or would take longer than computing ──▶ KNOWN
                 └─ budget spent, server gone ──────────────────────────────▶ OVER   (compute)

The question is asked when the request arrives, so the answer is often there when the engine looks at it; `look_up` does
not wait unless it is told that there is nothing else to do. What other tiers have may take as long as computing it
(`Pace`). A server that does not answer within the budget is not asked again until a probe was answered (`Breaker`).

Threads: the engine's thread; what comes for a request that has ended is given back on the client's.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from core.clock import Clock
from kvcache import wire
from kvcache.breaker import Breaker
from kvcache.client import Answer, CacheClient
from kvcache.keys import BlockKey, join_keys
from kvcache.orders import Load, Loaded, Piece
from kvcache.pace import Pace
from kvcache.prompt import KeyedPrompt

SEARCH_BUDGET_S = 0.1
"""How long a request may wait for the answer before it is computed without the cache. A hundred times what it takes."""

COMING_S = 2.0
"""How long blocks of other tiers may take while nobody knows how long computing them would."""

IN_STEP_S = 0.1
"""For how long a load may hold up a step that has one request: those that come have to wait for its end."""

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


_OPEN = (Stage.ASKED, Stage.COMING, Stage.PARTIAL)


class _Partial(NamedTuple):
    """A partial block that follows what was found."""

    key: BlockKey
    slot: wire.Slot
    num_tokens: int


@dataclass
class _LookUp:
    """One request's question and what came of it. partial_number: of the question for a partial block, 0 if none was
    asked."""

    number: int
    epoch: int
    prompt: KeyedPrompt
    reserves: bool
    asked_s: float
    stage: Stage = Stage.ASKED
    slots: list[wire.Slot] = field(default_factory=list)
    grants: list[wire.Grant] = field(default_factory=list)
    arena_id: str = ""
    num_coming: int = 0
    partial_number: int = 0
    partial: _Partial | None = None
    is_gone: bool = False

    def take(self, slots: Sequence[wire.Slot]) -> None:
        """What was found: full blocks, and if it is one more, the prompt's end."""
        num_keys = len(self.prompt.keys)
        self.slots = list(slots[:num_keys])
        if len(slots) > num_keys:
            partials = self.prompt.partials
            self.partial = _Partial(partials.last, slots[num_keys], partials.num_last)

    def key(self, index: int) -> BlockKey:
        """Of a granted place: one more than the full blocks is the prompt's end."""
        return self.prompt.keys[index] if index < len(self.prompt.keys) else self.prompt.partials.last


class Reader:
    """All look-ups of one instance."""

    def __init__(self, client: CacheClient, block_size: int, clock: Clock, budget_s: float = SEARCH_BUDGET_S) -> None:
        self._client = client
        self._block_size = block_size
        self._clock = clock
        self._budget_s = budget_s
        self._breaker = Breaker(clock)
        self.pace = Pace(clock)
        self._all: dict[str, _LookUp] = {}
        self._loads: list[Load] = []
        self._late: list[_LookUp] = []
        self._mapped = ""

    def arrive(self, prompt: KeyedPrompt, *, reserve: bool) -> None:
        """A request is new. reserve: it will compute and store the blocks that are not there."""
        request_id = prompt.request_id
        if request_id in self._all or not (prompt.keys or prompt.partials.last) or not self._breaker.allows():
            return
        keys, partials = join_keys(prompt.keys), prompt.partials
        number = self._client.search(
            keys, reserve=reserve, tenant=prompt.tenant, partial=partials.last, root=partials.root
        )
        if number:
            now_s = self._clock.monotonic_s()
            self._all[request_id] = _LookUp(number, self._client.epoch, prompt, reserve, now_s)

    def look_up(self, request_id: str, num_prompt: int, found_tokens: int, wait_s: float = 0.0) -> int | None:
        """How many tokens, after `found_tokens` of the engine's own cache, the arena has; at most all but the last
        of the prompt. None: not known yet. wait_s: for which an engine that has nothing else to do waits for an
        answer, since coming back takes longer than most answers."""
        look_up = self._all.get(request_id)
        if look_up is None:
            return 0
        if look_up.stage in _OPEN and not self._hear(look_up, wait_s):
            return None
        if look_up.stage is not Stage.KNOWN or not self.pace.is_worth_loading():
            return 0
        full_tokens = len(look_up.slots) * self._block_size
        if self._wants_partial(look_up, max(found_tokens, full_tokens), num_prompt):
            assert look_up.partial is not None, "it is wanted"
            full_tokens += look_up.partial.num_tokens
        return max(min(full_tokens, num_prompt - 1) - found_tokens, 0)

    def _wants_partial(self, look_up: _LookUp, known_tokens: int, num_prompt: int) -> bool:
        if look_up.partial is None:
            return False
        end_tokens = len(look_up.slots) * self._block_size + look_up.partial.num_tokens
        gained = min(end_tokens, num_prompt - 1) - known_tokens
        return gained > 0 and self.pace.is_worth_a_block(gained, self._block_size)

    def grants(self, request_id: str) -> list[tuple[BlockKey, int]]:
        """(key, offset) of blocks that the request may store, once; empty before the answer."""
        look_up = self._all.get(request_id)
        if look_up is None or (look_up.stage in _OPEN and not self._hear(look_up)):
            return []
        if look_up.epoch != self._client.epoch:
            return []
        granted, look_up.grants = look_up.grants, []
        return [(look_up.key(grant.index), grant.offset) for grant in granted]

    def fits_a_step(self, request_id: str, num_tokens: int, *, is_alone: bool) -> bool:
        """Whether loading so many tokens may be part of a step: it holds up nobody else, nor the request for long, and
        the workers, who have no time to map an arena then, have loaded from this one before."""
        look_up = self._all.get(request_id)
        if look_up is None or look_up.arena_id != self._mapped:
            return False
        return self.pace.fits_a_step(num_tokens, IN_STEP_S if is_alone else 0.0)

    def load(
        self, request_id: str, block_ids: Sequence[int], found_tokens: int, num_tokens: int, *, in_step: bool = False
    ) -> bool:
        """The engine has allocated blocks: fill those of tokens [found, found + num) from the arena. in_step: it
        computes with them in this very step."""
        look_up = self._all.get(request_id)
        if look_up is None or look_up.stage is not Stage.KNOWN:
            return False
        pieces = self._pieces(look_up, block_ids, found_tokens, found_tokens + num_tokens)
        self._loads.append(Load(request_id, look_up.arena_id, pieces, in_step))
        look_up.stage = Stage.LOADING
        return True

    def _pieces(self, look_up: _LookUp, block_ids: Sequence[int], first_token: int, end_token: int) -> list[Piece]:
        """The blocks with tokens [first, end)."""
        size = self._block_size
        slots = list(zip(look_up.prompt.keys, look_up.slots, strict=False))
        if look_up.partial is not None:
            slots.append((look_up.partial.key, look_up.partial.slot))
        pieces = []
        for index in range(first_token // size, -(-end_token // size)):
            key, slot = slots[index]
            num_tokens = min(end_token, (index + 1) * size) - max(first_token, index * size)
            pieces.append(Piece(block_ids[index], slot.offset, key, slot.digest, slot.tier, num_tokens))
        return pieces

    def has_loads(self) -> bool:
        """Whether the worker's next orders have loads."""
        return bool(self._loads)

    def take_loads(self) -> list[Load]:
        """The worker's orders for the step that is about to run."""
        self._late = [look_up for look_up in self._late if not self._give_back(look_up)]
        loads, self._loads = self._loads, []
        return loads

    def on_loaded(self, loaded: Loaded) -> None:
        """The worker has ended a load."""
        look_up = self._all.get(loaded.request_id)
        if loaded.bad:
            self._client.send(wire.Bad(loaded.bad))
        if not loaded.why:
            self.pace.loaded(loaded.num_blocks * self._block_size, loaded.waited_s, loaded.seconds)
        if look_up is not None and look_up.stage is Stage.LOADING:
            self._mapped = "" if loaded.why else look_up.arena_id
            self._end(look_up)
            if look_up.is_gone:
                del self._all[loaded.request_id]
                self._abandon(look_up)
                self._leave_late(look_up)

    def finished(self, request_id: str) -> None:
        """The engine is done with a request. Its pins stay while a load is under way."""
        look_up = self._all.get(request_id)
        if look_up is None:
            return
        if look_up.stage is Stage.LOADING:
            look_up.is_gone = True
            return
        del self._all[request_id]
        if look_up.stage in (Stage.ASKED, Stage.COMING):
            self._client.leave(look_up.number, lambda answer: self._give_back_left(look_up, answer))
            return
        if look_up.stage is Stage.PARTIAL:
            self._client.leave(look_up.partial_number, lambda answer: self._give_back_partial(look_up, answer))
        if look_up.stage in (Stage.KNOWN, Stage.PARTIAL):
            self._end(look_up)
        self._abandon(look_up)
        self._leave_late(look_up)

    def started(self, request_id: str) -> None:
        """The engine has begun without taking anything: nothing needs to stay pinned."""
        look_up = self._all.get(request_id)
        if look_up is not None and look_up.stage is Stage.KNOWN:
            self._end(look_up)

    def _hear(self, look_up: _LookUp, wait_s: float = 0.0) -> bool:
        """Whether the question has ended, with an answer or without."""
        if look_up.stage is Stage.PARTIAL:
            return self._hear_partial(look_up, wait_s)
        answer = self._client.take(look_up.number, wait_s if look_up.stage is Stage.ASKED else 0.0)
        if isinstance(answer, wire.Found):
            self._breaker.good()
            look_up.take(answer.slots)
            look_up.grants = list(answer.grants)
            look_up.arena_id, look_up.num_coming = self._client.arena_id, answer.coming
            look_up.stage = Stage.COMING if answer.coming else Stage.KNOWN
            if answer.has_partial and self._ask_partial(look_up):
                return self._hear_partial(look_up, wait_s)
            return look_up.stage is Stage.KNOWN
        is_lost = look_up.epoch != self._client.epoch or not self._client.is_connected
        if not is_lost and self._clock.monotonic_s() - look_up.asked_s < self._patience_s(look_up):
            return False
        if not is_lost:
            self._late.append(look_up)
        if look_up.stage is Stage.COMING:
            look_up.stage = Stage.KNOWN
        else:
            look_up.stage = Stage.OVER
            if not is_lost:
                self._breaker.bad()
        return True

    def _ask_partial(self, look_up: _LookUp) -> bool:
        num_blocks, prompt = len(look_up.slots), look_up.prompt
        keys = prompt.partials.after(num_blocks)
        is_end = num_blocks == len(prompt.keys) and keys[:1] == [prompt.partials.last]
        before = prompt.partials.before(num_blocks) if is_end and look_up.reserves else b""
        number = self._client.search_partial(join_keys(keys), before, prompt.tenant) if keys else 0
        if number:
            look_up.partial_number, look_up.asked_s = number, self._clock.monotonic_s()
            look_up.stage = Stage.PARTIAL
        return bool(number)

    def _hear_partial(self, look_up: _LookUp, wait_s: float) -> bool:
        """Whether that question has ended; without an answer the full blocks are used alone."""
        answer = self._client.take(look_up.partial_number, wait_s)
        num_blocks = len(look_up.slots)
        if isinstance(answer, wire.Found):
            keys = look_up.prompt.partials.after(num_blocks)
            look_up.grants += [wire.Grant(len(look_up.prompt.keys), grant.offset) for grant in answer.grants]
            if answer.slots and answer.index < len(keys):
                num_tokens = look_up.prompt.partials.num_tokens(num_blocks, answer.index)
                look_up.partial = _Partial(keys[answer.index], answer.slots[0], num_tokens)
        elif look_up.epoch == self._client.epoch and self._client.is_connected:
            if self._clock.monotonic_s() - look_up.asked_s < self._patience_s(look_up):
                return False
            self._breaker.bad()
            self._client.send(wire.Release(look_up.partial_number))
            num_keys = len(look_up.prompt.keys)
            if all(grant.index < num_keys for grant in look_up.grants):  # else a place may come with that answer
                self._client.send(wire.Abandon(look_up.prompt.partials.last))
        look_up.stage = Stage.KNOWN
        return True

    def _patience_s(self, look_up: _LookUp) -> float:
        if look_up.stage is not Stage.COMING:
            return min(self._budget_s, look_up.prompt.within_s * BUDGET_SHARE)
        compute_s = self.pace.compute_s(look_up.num_coming * self._block_size)
        patience_s = self._budget_s + (COMING_S if compute_s is None else compute_s)
        return min(patience_s, look_up.prompt.within_s * COMING_SHARE)

    def _end(self, look_up: _LookUp) -> None:
        look_up.stage = Stage.OVER
        if look_up.epoch == self._client.epoch:
            self._client.send(wire.Release(look_up.number))
            if look_up.partial_number:
                self._client.send(wire.Release(look_up.partial_number))

    def _give_back(self, look_up: _LookUp) -> bool:
        """Of an answer that came too late: its pins and places. True if nothing is left to wait for."""
        if look_up.epoch != self._client.epoch or not self._client.is_connected:
            return True
        answer = self._client.take(look_up.number)
        if not isinstance(answer, wire.Found) or answer.coming:
            return False
        self._breaker.good()
        if look_up.stage not in (Stage.KNOWN, Stage.LOADING):  # those still need their pins, and end them themselves
            self._client.send(wire.Release(look_up.number))
        look_up.grants = answer.grants
        self._abandon(look_up)
        return True

    def _leave_late(self, look_up: _LookUp) -> None:
        """Its request has ended, and an answer that it did not wait for may still come."""
        if look_up in self._late:
            self._late.remove(look_up)
            self._client.leave(look_up.number, lambda answer: self._give_back_left(look_up, answer))

    def _give_back_left(self, look_up: _LookUp, answer: Answer) -> bool:
        """What is granted to a request that has ended, and held for it: no step may come in which somebody would look.
        False if there is another answer to come."""
        if isinstance(answer, wire.Found) and answer.coming:
            return False
        self._client.send(wire.Release(look_up.number))
        look_up.grants = list(answer.grants)
        self._abandon(look_up)
        return True

    def _give_back_partial(self, look_up: _LookUp, answer: Answer) -> bool:
        """The same of the place for the prompt's end."""
        if answer.grants:
            self._client.send(wire.Abandon(look_up.prompt.partials.last))
        return True

    def _abandon(self, look_up: _LookUp) -> None:
        """Gives back places that nobody will write."""
        if look_up.grants and look_up.epoch == self._client.epoch:
            keys = join_keys(look_up.key(grant.index) for grant in look_up.grants)
            self._client.send(wire.Abandon(keys))
            look_up.grants = []
