"""No exception may leave a connector hook: it would end vLLM's engine core and every request in it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from vllm.logger import init_logger

_P = ParamSpec("_P")
_R = TypeVar("_R")
_log = init_logger("vllm.baton")


def never_raises(default: _R) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Logs what a hook raises and returns `default`, with which the engine computes the request by itself."""

    def decorate(hook: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(hook)
        def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            try:
                return hook(*args, **kwargs)
            except Exception:  # noqa: BLE001 - the engine must survive a mistake of ours; it then computes by itself
                _log.exception("%s failed; the engine goes on without the hand-off", hook.__name__)
                return default

        return guarded

    return decorate
