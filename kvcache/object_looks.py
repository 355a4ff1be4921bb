"""Whether objects are there: looked at several at once, within a request's patience, and remembered.

    count(keys) ──▶ what was seen ──▶ at most LOOKS keys, spread over the rest ──▶ again between the last that is there
                                                                                 and the first that is not

What was there is remembered until a read misses it, what was not for ABSENT_S: several hosts may share a store.

Memory model: at most MAX_REMEMBERED keys of either kind.
Threading: any thread; looks run in LOOKS threads. While those of earlier calls hang, nothing more is looked at.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from core.clock import Clock
from kvcache.keys import BlockKey
from kvcache.tier import TierError

LOOKS = 16
COUNT_S = 0.08
"""After so long `count` says what it has found so far; less than a request waits for the server's answer."""

ABSENT_S = 5.0
MAX_REMEMBERED = 1 << 18

T = TypeVar("T")


class Sightings:
    """Which keys were seen in a store, and which were not. Any thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: OrderedDict[BlockKey, None] = OrderedDict()
        self._absent_until_s: OrderedDict[BlockKey, float] = OrderedDict()

    def knows(self, key: BlockKey) -> bool:
        with self._lock:
            return key in self._seen

    def bounds(self, keys: Sequence[BlockKey]) -> tuple[int, int]:
        """How many of the first keys were seen, and how many may be there: those before the first that was not."""
        now_s = self._clock.monotonic_s()
        with self._lock:
            low = next((at for at, key in enumerate(keys) if key not in self._seen), len(keys))
            absent = (at for at, key in enumerate(keys) if self._absent_until_s.get(key, 0.0) > now_s)
            return low, next(absent, len(keys))

    def seen(self, key: BlockKey) -> None:
        with self._lock:
            self._absent_until_s.pop(key, None)
            _remember(self._seen, key, None)

    def clear(self) -> None:
        """The store was emptied."""
        with self._lock:
            self._seen.clear()

    def missed(self, key: BlockKey) -> None:
        with self._lock:
            self._seen.pop(key, None)
            _remember(self._absent_until_s, key, self._clock.monotonic_s() + ABSENT_S)


class Looks:
    """`look_at(key)` asks the store, tells `sightings`, and raises TierError if it cannot."""

    def __init__(self, look_at: Callable[[BlockKey], object], sightings: Sightings, clock: Clock) -> None:
        self._look_at = look_at
        self._sightings = sightings
        self._clock = clock
        self._threads = ThreadPoolExecutor(LOOKS, thread_name_prefix="baton-cache-look")
        self._lock = threading.Lock()
        self._trouble: TierError | None = None
        self.num_pending = 0

    def count(self, keys: Sequence[BlockKey]) -> int:
        """How many of the first keys are there, without a gap, as far as could be seen in COUNT_S; between two that are
        there the others are taken to be. Raises TierError if the latest look could not be made."""
        self._raise_trouble()
        until_s = self._clock.monotonic_s() + COUNT_S
        low, high = self._sightings.bounds(keys)
        while low < high and (remaining_s := until_s - self._clock.monotonic_s()) > 0:
            places = _spread(low, high)
            self.look([keys[place] for place in places if not self._sightings.knows(keys[place])], remaining_s)
            for place in places:
                if not self._sightings.knows(keys[place]):
                    high = place
                    break
                low = place + 1
        return low

    def look(self, keys: Sequence[BlockKey], timeout_s: float) -> None:
        """Looks at each, at some of them perhaps only later. Raises TierError once it is closed."""
        with self._lock:
            is_busy = self.num_pending > LOOKS
            self.num_pending += 0 if is_busy else len(keys)
        if is_busy:
            return
        try:
            wait([self._threads.submit(self._look, key) for key in keys], timeout_s)
        except RuntimeError as error:
            raise TierError("the store of objects is closed") from error

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _look(self, key: BlockKey) -> None:
        trouble = None
        try:
            self._look_at(key)
        except TierError as error:
            trouble = error
        with self._lock:
            self._trouble = trouble
            self.num_pending -= 1

    def _raise_trouble(self) -> None:
        """What the latest look met with, once."""
        with self._lock:
            trouble, self._trouble = self._trouble, None
        if trouble is not None:
            raise TierError(str(trouble)) from trouble


def _spread(low: int, high: int) -> list[int]:
    """At most LOOKS places in [low, high), evenly, the first and the last among them."""
    num_places = min(high - low, LOOKS)
    return sorted({low + step * (high - 1 - low) // max(num_places - 1, 1) for step in range(num_places)})


def _remember(keys: OrderedDict[BlockKey, T], key: BlockKey, value: T) -> None:
    """As the newest; the oldest are forgotten."""
    keys[key] = value
    keys.move_to_end(key)
    while len(keys) > MAX_REMEMBERED:
        keys.popitem(last=False)
