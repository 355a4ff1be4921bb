"""On which cores a transport's own threads may run, and how many of them copy: a thread inherits the cores of whoever
starts it, which is the core that computes."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

MAX_COPYING_THREADS = 4
CORES_PER_COPYING_THREAD = 8
"""Of a large machine, whose other cores compute for other requests meanwhile; a small one has two threads."""


def num_copying_threads(num_cores: int) -> int:
    """How many threads share one large copy."""
    return min(num_cores, max(2, min(num_cores // CORES_PER_COPYING_THREAD, MAX_COPYING_THREADS)))


def widen_affinity() -> None:
    """Lets the calling thread run wherever this process's threads and its parent may."""
    cores: set[int] = set()
    threads = [int(each.name) for each in Path("/proc/self/task").iterdir()]
    for thread in (*threads, os.getppid()):
        with suppress(OSError):  # it has ended meanwhile, or belongs to someone else
            cores |= os.sched_getaffinity(thread)
    with suppress(OSError):
        os.sched_setaffinity(0, cores)
