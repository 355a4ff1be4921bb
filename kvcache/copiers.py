"""The threads that copy between the arena and an engine, beside whichever thread wants a copy.

One core does not use up a memory's bandwidth, and the engine's own threads compute meanwhile. Started when they are
first needed. Threading: anything from any thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from transport.affinity import num_copying_threads, widen_affinity

P = ParamSpec("P")
T = TypeVar("T")


class Copiers:
    """num_threads: that share one large copy, whoever wants it among them."""

    def __init__(self, num_threads: int = 0) -> None:
        """num_threads: 0 for what suits this machine."""
        self.num_threads = num_threads or num_copying_threads(os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(self.num_threads, "baton-cache-copy", widen_affinity)

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Calls on one of the threads."""
        return self._pool.submit(call, *args, **kwargs)

    def close(self) -> None:
        """Ends the threads, each behind the call that it is in. Does not wait."""
        self._pool.shutdown(wait=False)
