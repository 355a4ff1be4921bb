"""One tier below the arena as its server drives it: a small pool of threads, a time limit per call, and a breaker.

Threading: the server's event loop; the tier's own calls run in the pool.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from core.clock import Clock
from kvcache.breaker import Breaker
from kvcache.tier import Tier, TierError

THREADS_PER_TIER = 4

T = TypeVar("T")


@dataclass
class TierCounts:
    """One tier since the server started, in blocks and bytes; uncleared: how often it did not forget all of them."""

    hits: int = 0
    get_bytes: int = 0
    get_s: float = 0.0
    puts: int = 0
    put_bytes: int = 0
    dropped: int = 0
    errors: int = 0
    uncleared: int = 0


class Level:
    """One tier with its threads and its breaker."""

    def __init__(self, tier: Tier, clock: Clock) -> None:
        self.tier = tier
        self.counts = TierCounts()
        self._breaker = Breaker(clock)
        self._pool = ThreadPoolExecutor(THREADS_PER_TIER, thread_name_prefix=f"baton-cache-{tier.name}")

    @property
    def is_bypassed(self) -> bool:
        return self._breaker.is_open

    def submit(self, call: Callable[[], T]) -> asyncio.Future[T] | None:
        """Runs one call of the tier in a thread; None while the tier is bypassed."""
        if not self._breaker.allows():
            return None
        return asyncio.get_running_loop().run_in_executor(self._pool, call)

    async def wait(self, future: asyncio.Future[T] | None, timeout_s: float, otherwise: T) -> T:
        """The call's result; `otherwise` if the tier failed or is late, which counts against it."""
        if future is None:
            return otherwise
        try:
            result = await asyncio.wait_for(asyncio.shield(future), timeout_s)
        except Exception as error:  # noqa: BLE001 - a tier's mistake must cost its blocks and not the server
            if not isinstance(error, TierError | TimeoutError):
                print(f"tier {self.tier.name}: {type(error).__name__}: {error}", flush=True)
            self.counts.errors += 1
            self._breaker.bad()
            future.add_done_callback(_forget)
            return otherwise
        self._breaker.good()
        return result

    def close(self) -> None:
        """Without waiting for threads that hang."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.tier.close()


def _forget(future: asyncio.Future[T]) -> None:
    """Of a call that nobody waits for any more: its error is no news."""
    if not future.cancelled():
        future.exception()
