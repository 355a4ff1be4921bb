"""What a request leaves in the cache, decided beside the engine's scheduler.

Each full block is stored once, by whoever computed it first: the server grants a place only for a block that nobody
has written or is writing. Prompt blocks are asked for with the look-up, blocks of the answer as their tokens come; a
place that is granted too late for one step is filled in the next, as long as the request runs.

A block that somebody else is writing is asked for again a little later, in case that one gives up.

    keys known ── Reserve ──▶ granted ── computed by the end of a step ──▶ Store ──▶ stored ── Commit ──▶ found

Threads: the engine's thread; what is granted to a request that has ended is given back on the client's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from core.clock import Clock
from kvcache import wire
from kvcache.client import Answer, CacheClient
from kvcache.index import RESERVATION_S
from kvcache.keys import BlockKey, join_keys
from kvcache.orders import Piece, Store, Stored
from kvcache.prompt import KeyedPrompt

MARGIN_S = 10.0
"""How long before a reservation's end its place is not written any more."""

FIRST_PAUSE_S = 0.1
"""Before a refused block is asked for again; doubles each time."""


class _Place(NamedTuple):
    """One block's place in the arena; after `deadline_s` (monotonic) it may be another's."""

    offset: int
    deadline_s: float


@dataclass
class _Places:
    """One request's blocks in the arena.

    num_prompt: its prompt's tokens. partial: the key of the partial block at their end, stored when they are computed;
    its place comes with the look-up or never. asked: how many of its keys, from the first, were asked for.
    question: the one that is open, for the keys of `questioned`, asked at `asked_s`. refused: those that somebody else
    had or was writing. tenant: on whose account.
    """

    epoch: int
    asked_s: float
    num_prompt: int
    partial: BlockKey
    tenant: bytes
    keys: list[BlockKey] = field(default_factory=list)
    asked: int = 0
    question: int = 0
    questioned: list[int] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    ask_again_s: float = 0.0
    pause_s: float = FIRST_PAUSE_S
    granted: dict[int, _Place] = field(default_factory=dict)
    partial_place: _Place | None = None


class Writer:
    """All stores of one instance."""

    def __init__(self, client: CacheClient, block_size: int, clock: Clock) -> None:
        self._client = client
        self._block_size = block_size
        self._clock = clock
        self._all: dict[str, _Places] = {}
        self._stores: list[Store] = []

    def arrive(self, prompt: KeyedPrompt, *, asked: bool) -> None:
        """A request is new. asked: its look-up has asked for the places of the prompt's missing blocks, or somebody
        else stores them."""
        if prompt.request_id not in self._all and self._client.is_connected:
            now_s, partial = self._clock.monotonic_s(), prompt.partials.last
            places = _Places(self._client.epoch, now_s, prompt.num_tokens, partial, prompt.tenant, list(prompt.keys))
            places.asked = len(prompt.keys) if asked else 0
            self._all[prompt.request_id] = places

    def computes(self, request_id: str) -> None:
        """Nobody else stores the prompt's blocks after all."""
        places = self._all.get(request_id)
        if places is not None:
            places.asked = 0

    def granted(self, request_id: str, places: Sequence[tuple[BlockKey, int]]) -> None:
        """The look-up's answer."""
        known = self._all.get(request_id)
        if known is not None and places:
            at = {key: index for index, key in enumerate(known.keys)}
            deadline_s = known.asked_s + RESERVATION_S - MARGIN_S
            known.granted |= {at[key]: _Place(offset, deadline_s) for key, offset in places if key in at}
            partial = [offset for key, offset in places if key == known.partial]
            known.partial_place = _Place(partial[0], deadline_s) if partial else None

    def is_due(self, request_id: str, num_tokens: int, num_keys: int) -> bool:
        """Whether `scheduled` has something to do: cheap, for every request of every step."""
        places = self._all.get(request_id)
        if places is None:
            return False
        num_full = num_tokens // self._block_size
        if places.question or num_keys > places.asked or any(index < num_full for index in places.granted):
            return True
        if places.partial_place is not None and num_tokens >= places.num_prompt:
            return True
        return bool(places.refused) and self._clock.monotonic_s() >= places.ask_again_s

    def scheduled(self, request_id: str, keys: Sequence[BlockKey], num_tokens: int, block_ids: Sequence[int]) -> None:
        """When this step ends, `num_tokens` of the request are computed. keys: of all its full blocks so far."""
        places = self._all.get(request_id)
        if places is None:
            return
        if places.epoch != self._client.epoch:
            del self._all[request_id]
            return
        self._hear(places)
        self._expire(places)
        num_full = min(num_tokens // self._block_size, len(keys), len(block_ids))
        ready = sorted(index for index in places.granted if index < num_full)
        due = [(block_ids[index], places.granted.pop(index), keys[index]) for index in ready]
        last = places.num_prompt // self._block_size
        if places.partial_place is not None and num_tokens >= places.num_prompt and last < len(block_ids):
            due.append((block_ids[last], places.partial_place, places.partial))
            places.partial_place = None
        if due:
            pieces = [Piece(block_id, place.offset, key) for block_id, place, key in due]
            deadline_s = min(place.deadline_s for _, place, _ in due)
            self._stores.append(Store(request_id, self._client.arena_id, places.epoch, deadline_s, pieces))
        self._ask(places, keys)

    def take_stores(self) -> list[Store]:
        """The worker's orders for the step that is about to run."""
        stores, self._stores = self._stores, []
        return stores

    def on_stored(self, stored: Stored) -> None:
        """The worker has ended a step's store."""
        if stored.epoch != self._client.epoch:
            return
        if stored.blocks:
            self._client.send(wire.Commit(stored.blocks))
        if stored.given_up:
            self._client.send(wire.Abandon(join_keys(stored.given_up)))

    def finished(self, request_id: str) -> None:
        """The engine is done with the request: what was granted and not stored is given up."""
        places = self._all.pop(request_id, None)
        if places is None or places.epoch != self._client.epoch:
            return
        if places.keys:
            self._client.send(wire.Touch(join_keys(places.keys)))
        unused = [places.keys[index] for index in sorted(places.granted)]
        unused += [places.partial] if places.partial_place is not None else []
        if unused:
            self._client.send(wire.Abandon(join_keys(unused)))
        if places.question:
            asked = [places.keys[index] for index in places.questioned]
            self._client.leave(places.question, lambda answer: self._give_back(asked, answer))

    def _give_back(self, asked: Sequence[BlockKey], answer: Answer) -> bool:
        """Places that are granted to a request that has ended: no step may come in which somebody would look."""
        unused = [asked[grant.index] for grant in answer.grants if grant.index < len(asked)]
        if unused:
            self._client.send(wire.Abandon(join_keys(unused)))
        return True

    def _hear(self, places: _Places) -> None:
        if not places.question:
            return
        answer = self._client.take(places.question)
        if isinstance(answer, wire.Granted):
            deadline_s = places.asked_s + RESERVATION_S - MARGIN_S
            granted = {
                places.questioned[grant.index]: _Place(grant.offset, deadline_s)
                for grant in answer.grants
                if grant.index < len(places.questioned)
            }
            places.granted |= granted
            places.refused += [index for index in places.questioned if index not in granted]
            places.question = 0

    def _expire(self, places: _Places) -> None:
        """Places that were not filled in time, by a request that waited long: asked for again."""
        now_s = self._clock.monotonic_s()
        if places.partial_place is not None and now_s >= places.partial_place.deadline_s:
            places.partial_place = None
        for index in [index for index, place in places.granted.items() if now_s >= place.deadline_s]:
            del places.granted[index]
            places.refused.append(index)

    def _ask(self, places: _Places, keys: Sequence[BlockKey]) -> None:
        """For blocks whose tokens have come since the last question and, after a pause, for those that were refused."""
        if places.question:
            return
        now_s = self._clock.monotonic_s()
        places.keys.extend(keys[len(places.keys) :])
        wanted = list(range(places.asked, len(keys)))
        if places.refused and now_s >= places.ask_again_s:
            places.ask_again_s, places.pause_s = now_s + places.pause_s, places.pause_s * 2
            wanted = [*places.refused, *wanted]
        if not wanted:
            return
        places.question = self._client.reserve(join_keys(keys[index] for index in wanted), places.tenant)
        if places.question:
            places.questioned, places.asked, places.asked_s = wanted, len(keys), now_s
            places.refused = [index for index in places.refused if index not in wanted]
