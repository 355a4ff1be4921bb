"""Which cores compute, equally for every system: vLLM takes another number of cores as soon as a connector is set.

    core a: every prefill engine and every plain one        core b: every decode engine behind a prefill one

Only one system is asked at a time, so each has core a (and b) for itself. API servers, the proxy and this client run
wherever the system puts them.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from engine.instance import ENV_VLLM_CORES


def pair() -> tuple[int, int]:
    """(prefill and plain, decode): the first two cores that this process may use; twice the same if there is one."""
    usable = sorted(os.sched_getaffinity(0))
    return usable[0], usable[min(1, len(usable) - 1)]


@contextmanager
def only(cores: Collection[int]) -> Iterator[None]:
    """Inside, the calling thread may use these cores alone, and a cluster that is planned here shares them out.

    A binding in the environment is hidden meanwhile: it would give every instance the same cores.
    """
    before = os.sched_getaffinity(0)
    hidden = os.environ.pop(ENV_VLLM_CORES, None)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        if hidden is not None:
            os.environ[ENV_VLLM_CORES] = hidden
