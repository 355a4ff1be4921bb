"""On which cores a transport's own thread may run: it inherits those of whoever starts it, the core that computes."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def widen_affinity() -> None:
    """Lets the calling thread run wherever this process's threads and its parent may."""
    cores: set[int] = set()
    threads = [int(each.name) for each in Path("/proc/self/task").iterdir()]
    for thread in (*threads, os.getppid()):
        with suppress(OSError):  # it has ended meanwhile, or belongs to someone else
            cores |= os.sched_getaffinity(thread)
    with suppress(OSError):
        os.sched_setaffinity(0, cores)
