"""Every change that Baton makes to vLLM, in one file: only in a preloaded process that forks servers, never elsewhere.

vLLM's CPU platform insists on `spawn`, so that every engine core would import vLLM again (7 to 15 seconds). Here the
modules that ask for a multiprocessing context get the forking one. Each name is checked first; if one is missing the
launcher falls back to starting servers plainly.
"""

from __future__ import annotations

import importlib
import multiprocessing
import sys
from multiprocessing.context import BaseContext

from core.errors import UnsupportedError

_NAME = "get_mp_context"
_ASKING_MODULES = (
    "vllm.utils.system_utils",
    "vllm.v1.engine.coordinator",
    "vllm.v1.engine.utils",
    "vllm.v1.executor.multiproc_executor",
)


def fork_engines() -> None:
    """Raises UnsupportedError, with nothing changed, if this vLLM does not ask where 0.32 asks."""
    modules = [importlib.import_module(name) for name in _ASKING_MODULES]
    original = getattr(modules[0], _NAME, None)
    wrong = [module.__name__ for module in modules if getattr(module, _NAME, None) is not original]
    if original is None or wrong:
        raise UnsupportedError(f"this vLLM has no {_NAME} in {', '.join(wrong) or _ASKING_MODULES[0]}")
    forking = multiprocessing.get_context("fork")

    def get_mp_context() -> BaseContext:
        return forking

    for module in list(sys.modules.values()):
        if module.__name__.startswith("vllm") and vars(module).get(_NAME) is original:
            setattr(module, _NAME, get_mp_context)
