"""Every change that Baton makes to vLLM while it runs, in one file.

In a preloaded process that forks servers, and nowhere else: vLLM's CPU platform insists on `spawn`, so that every
engine core would import vLLM again (7 to 15 seconds); the modules that ask for a multiprocessing context get the
forking one.

In every engine on a CPU: a prompt that is computed in several steps and has a seed ends the engine core of vLLM 0.32
(`RuntimeError: CPU Generator does not use offset`), and with it everybody's requests. Its own generator is kept out of
the draws that are thrown away, which is what vLLM does on a GPU by winding it back.

Each name is checked first; where one is missing nothing is changed.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import sys
from multiprocessing.context import BaseContext
from typing import Any

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


def keep_seeds_on_cpu() -> None:
    """Raises UnsupportedError, with nothing changed, if this vLLM does not sample where 0.32 does."""
    runner = importlib.import_module("vllm.v1.worker.cpu_model_runner").CPUModelRunner
    original = getattr(runner, "sample_tokens", None)
    if original is None or not hasattr(runner, "_bookkeeping_sync"):
        raise UnsupportedError("this vLLM's CPUModelRunner has no sample_tokens and _bookkeeping_sync")

    @functools.wraps(original)
    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        generators = self.input_batch.generators
        in_vain = self.discard_request_mask.np[: self.input_batch.num_reqs]
        kept = {index: generators.pop(index) for index in list(generators) if in_vain[index]} if generators else {}
        try:
            return original(self, grammar_output)
        finally:
            generators.update(kept)

    runner.sample_tokens = sample_tokens
