"""What requests take from the cache, decided beside the engine's scheduler.

    arrive ──▶ look-up ── known ──▶ load ── the worker ──▶ loaded ──▶ its pins are given back
                  └─ nothing, or too late ──▶ computed

The question is asked when the request arrives, so the answer is often there when the engine looks at it; `look_up` does
not wait unless it is told that there is nothing else to do. What other tiers have may take as long as computing it
(`Pace`). A server that does not answer within the budget is not asked again until a probe was answered (`Breaker`).

Threads: the engine's thread alone. One request's question: kvcache/look_up.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from core.clock import Clock
from kvcache import wire
from kvcache.breaker import Breaker
from kvcache.client import CacheClient
from kvcache.keys import BlockKey
from kvcache.look_up import Desk, LookUp, Stage
from kvcache.orders import Load, Loaded
from kvcache.pace import Pace
from kvcache.prompt import KeyedPrompt

SEARCH_BUDGET_S = 0.1
"""How long a request may wait for the answer before it is computed without the cache. A hundred times what it takes."""

IN_STEP_S = 0.1
"""For how long a load may hold up a step that has one request: those that come have to wait for its end."""


class Reader:
    """All look-ups of one instance."""

    def __init__(self, client: CacheClient, block_size: int, clock: Clock, budget_s: float = SEARCH_BUDGET_S) -> None:
        self.pace = Pace(clock)
        self._desk = Desk(client, clock, Breaker(clock), self.pace, block_size, budget_s)
        self._all: dict[str, LookUp] = {}
        self._gone: set[str] = set()
        self._loads: list[Load] = []
        self._mapped = ""

    def arrive(self, prompt: KeyedPrompt, *, reserve: bool) -> None:
        """A request is new. reserve: it will compute and store the blocks that are not there."""
        request_id = prompt.request_id
        if request_id in self._all or not (prompt.keys or prompt.partials.last) or not self._desk.breaker.allows():
            return
        look_up = LookUp.ask(self._desk, prompt, reserve=reserve)
        if look_up is not None:
            self._all[request_id] = look_up

    def look_up(self, request_id: str, num_prompt: int, found_tokens: int, wait_s: float = 0.0) -> int | None:
        """How many tokens, after `found_tokens` of the engine's own cache, the arena has; at most all but the last
        of the prompt. None: not known yet. wait_s: for which an engine that has nothing else to do waits for an
        answer, since coming back takes longer than most answers."""
        look_up = self._all.get(request_id)
        if look_up is None:
            return 0
        if not look_up.hear(wait_s):
            return None
        if look_up.stage is not Stage.KNOWN or not self.pace.is_worth_loading():
            return 0
        return look_up.num_tokens(found_tokens, num_prompt)

    def grants(self, request_id: str) -> list[tuple[BlockKey, int]]:
        """(key, offset) of blocks that the request may store, once; empty before the answer."""
        look_up = self._all.get(request_id)
        return [] if look_up is None or not look_up.hear() else look_up.take_grants()

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
        pieces = look_up.pieces(block_ids, found_tokens, found_tokens + num_tokens)
        self._loads.append(Load(request_id, look_up.arena_id, pieces, in_step))
        look_up.stage = Stage.LOADING
        return True

    def has_loads(self) -> bool:
        """Whether the worker's next orders have loads."""
        return bool(self._loads)

    def take_loads(self) -> list[Load]:
        """The worker's orders for the step that is about to run."""
        loads, self._loads = self._loads, []
        return loads

    def on_loaded(self, loaded: Loaded) -> None:
        """The worker has ended a load."""
        request_id, look_up = loaded.request_id, self._all.get(loaded.request_id)
        if loaded.bad:
            self._desk.client.send(wire.Bad(loaded.bad))
        if not loaded.why:
            self.pace.loaded(loaded.num_blocks * self._desk.block_size, loaded.waited_s, loaded.seconds)
        if look_up is not None and look_up.stage is Stage.LOADING:
            self._mapped = "" if loaded.why else look_up.arena_id
            look_up.end()
            if request_id in self._gone:
                self._gone.remove(request_id)
                self._all.pop(request_id).leave()

    def finished(self, request_id: str) -> None:
        """The engine is done with a request. Its pins stay while a load is under way."""
        look_up = self._all.get(request_id)
        if look_up is None:
            return
        if look_up.stage is Stage.LOADING:
            self._gone.add(request_id)
        else:
            self._all.pop(request_id).leave()

    def started(self, request_id: str) -> None:
        """The engine has begun without taking anything: nothing needs to stay pinned."""
        look_up = self._all.get(request_id)
        if look_up is not None and look_up.stage is Stage.KNOWN:
            look_up.end()
