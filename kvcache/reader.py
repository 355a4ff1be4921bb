"""What a request takes from the cache, decided beside the engine's scheduler.

    arrive ──▶ ASKED ── answer ──▶ KNOWN ── load ──▶ LOADING ── loaded ──▶ OVER
                 │ └─ some, more is coming ──▶ COMING ── it came, or would take longer than computing ──▶ KNOWN
                 └─ budget spent, server gone ──────────────────────────────▶ OVER   (compute)

The question is asked when the request arrives, so the answer is there when the engine looks at it; `look_up` never
waits. What other tiers have may take as long as computing it would (`Pace`). A server that does not answer within the
budget is not asked again until a probe was answered (`Breaker`).

Threads: the engine's thread alone.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from core.clock import Clock
from kvcache import wire
from kvcache.breaker import Breaker
from kvcache.client import CacheClient
from kvcache.keys import BlockKey, join_keys
from kvcache.orders import Load, Loaded, Piece
from kvcache.pace import Pace

SEARCH_BUDGET_S = 0.1
"""How long a request may wait for the answer before it is computed without the cache. A hundred times what it takes."""

COMING_S = 2.0
"""How long blocks of other tiers may take while nobody knows how long computing them would."""


class Stage(enum.Enum):
    """Where a request's look-up stands."""

    ASKED = "asked"
    COMING = "coming"
    KNOWN = "known"
    LOADING = "loading"
    OVER = "over"


_OPEN = (Stage.ASKED, Stage.COMING)


@dataclass
class _LookUp:
    """One request's question and what came of it."""

    number: int
    epoch: int
    keys: Sequence[BlockKey]
    asked_s: float
    stage: Stage = Stage.ASKED
    slots: list[wire.Slot] = field(default_factory=list)
    grants: list[wire.Grant] = field(default_factory=list)
    arena_id: str = ""
    num_coming: int = 0
    is_gone: bool = False


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

    def arrive(self, request_id: str, keys: Sequence[BlockKey], *, reserve: bool, tenant: bytes = b"") -> None:
        """A request is new. keys: of its prompt's full blocks; reserve: it will compute those that are not there, on
        this tenant's account."""
        if request_id in self._all or not keys or not self._breaker.allows():
            return
        number = self._client.search(join_keys(keys), reserve=reserve, tenant=tenant)
        if number:
            self._all[request_id] = _LookUp(number, self._client.epoch, keys, self._clock.monotonic_s())

    def look_up(self, request_id: str, num_prompt: int, found_tokens: int) -> int | None:
        """How many tokens, after `found_tokens` of the engine's own cache, the arena has; at most all but the last
        of the prompt. None: not known yet."""
        look_up = self._all.get(request_id)
        if look_up is None:
            return 0
        if look_up.stage in _OPEN and not self._hear(look_up):
            return None
        if look_up.stage is not Stage.KNOWN or not look_up.slots or not self.pace.is_worth_loading():
            return 0
        return max(min(len(look_up.slots) * self._block_size, num_prompt - 1) - found_tokens, 0)

    def grants(self, request_id: str) -> list[tuple[BlockKey, int]]:
        """(key, offset) of blocks that the request may store, once; empty before the answer."""
        look_up = self._all.get(request_id)
        if look_up is None or (look_up.stage in _OPEN and not self._hear(look_up)):
            return []
        if look_up.epoch != self._client.epoch:
            return []
        granted, look_up.grants = look_up.grants, []
        return [(look_up.keys[grant.index], grant.offset) for grant in granted]

    def load(self, request_id: str, block_ids: Sequence[int], found_tokens: int, num_tokens: int) -> bool:
        """The engine has allocated blocks: fill those of tokens [found, found + num) from the arena."""
        look_up = self._all.get(request_id)
        if look_up is None or look_up.stage is not Stage.KNOWN:
            return False
        first, end = found_tokens // self._block_size, -(-(found_tokens + num_tokens) // self._block_size)
        pieces = [
            Piece(block_ids[index], slot.offset, look_up.keys[index], slot.digest, slot.tier)
            for index, slot in enumerate(look_up.slots[:end])
            if index >= first
        ]
        self._loads.append(Load(request_id, look_up.arena_id, pieces))
        look_up.stage = Stage.LOADING
        return True

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
            self.pace.loaded(loaded.num_blocks * self._block_size, loaded.seconds)
        if look_up is not None and look_up.stage is Stage.LOADING:
            self._end(look_up)
            if look_up.is_gone:
                del self._all[loaded.request_id]
                self._abandon(look_up)

    def finished(self, request_id: str) -> None:
        """The engine is done with a request. Its pins stay while a load is under way."""
        look_up = self._all.get(request_id)
        if look_up is None:
            return
        if look_up.stage is Stage.LOADING:
            look_up.is_gone = True
            return
        del self._all[request_id]
        if look_up.stage in _OPEN:
            self._late.append(look_up)
            return
        if look_up.stage is Stage.KNOWN:
            self._end(look_up)
        self._abandon(look_up)

    def started(self, request_id: str) -> None:
        """The engine has begun without taking anything: nothing needs to stay pinned."""
        look_up = self._all.get(request_id)
        if look_up is not None and look_up.stage is Stage.KNOWN:
            self._end(look_up)

    def _hear(self, look_up: _LookUp) -> bool:
        """Whether the question has ended, with an answer or without."""
        answer = self._client.take(look_up.number)
        if isinstance(answer, wire.Found):
            self._breaker.good()
            look_up.slots, look_up.grants = answer.slots[: len(look_up.keys)], answer.grants
            look_up.arena_id, look_up.num_coming = self._client.arena_id, answer.coming
            look_up.stage = Stage.COMING if answer.coming else Stage.KNOWN
            return not answer.coming
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

    def _patience_s(self, look_up: _LookUp) -> float:
        if look_up.stage is Stage.ASKED:
            return self._budget_s
        compute_s = self.pace.compute_s(look_up.num_coming * self._block_size)
        return self._budget_s + (COMING_S if compute_s is None else compute_s)

    def _end(self, look_up: _LookUp) -> None:
        look_up.stage = Stage.OVER
        if look_up.epoch == self._client.epoch:
            self._client.send(wire.Release(look_up.number))

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

    def _abandon(self, look_up: _LookUp) -> None:
        """Gives back places that nobody will write."""
        if look_up.grants and look_up.epoch == self._client.epoch:
            keys = join_keys(look_up.keys[grant.index] for grant in look_up.grants)
            self._client.send(wire.Abandon(keys))
            look_up.grants = []
