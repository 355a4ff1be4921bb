"""How fast this engine computes prompts and loads blocks, as measured: whether loading is worth it, and worth a step.

All are moving averages; the newest measurement counts a fifth. Where one is not known yet, loading is taken to be worth
it, but not to fit a step. After it was judged not to be worth it, one load is tried again every RETRY_S, or nothing
would be measured any more. What is not worth loading is not worth storing either, with the same exception.

Threading: the engine's thread alone.
"""

from __future__ import annotations

from core.clock import Clock

WEIGHT = 0.2
MIN_TOKENS = 64
"""Steps with fewer prompt tokens say little about prefill, and with more little about the next token."""

RETRY_S = 30.0


class Pace:
    """Seconds per token of prefill, of what loads are waited for, and of their copies; seconds of a step that computes
    next tokens."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._compute: float | None = None
        self._load: float | None = None
        self._copy: float | None = None
        self._step: float | None = None
        self._retry_s = 0.0
        self._retry_store_s = 0.0

    def computed(self, num_tokens: int, seconds: float) -> None:
        """A step that computed so many prompt tokens, and the next tokens of running requests, took so long."""
        if seconds <= 0:
            return
        if num_tokens >= MIN_TOKENS:
            self._compute = _mean(self._compute, seconds / num_tokens)
        else:
            self._step = _mean(self._step, seconds)

    def loaded(self, num_tokens: int, waited_s: float, copy_s: float) -> None:
        """A load of so many tokens held its request up for so long, and took so long to copy."""
        if num_tokens > 0 and waited_s > 0:
            self._load = _mean(self._load, waited_s / num_tokens)
        if num_tokens > 0 and copy_s > 0:
            self._copy = _mean(self._copy, copy_s / num_tokens)

    def compute_s(self, num_tokens: int) -> float | None:
        """What computing so many tokens is likely to take; None while that was never measured."""
        return None if self._compute is None else self._compute * num_tokens

    def fits_a_step(self, num_tokens: int, may_wait_s: float) -> bool:
        """Whether so many tokens can be loaded beside a step that computes next tokens, or hold it up for no longer
        than it may be."""
        if self._load is not None and self._load * num_tokens < may_wait_s:
            return True
        return self._copy is not None and self._step is not None and self._copy * num_tokens < self._step

    def is_worth_loading(self) -> bool:
        """Whether a token is loaded faster than computed."""
        if self._is_loading_faster():
            return True
        now_s = self._clock.monotonic_s()
        if now_s < self._retry_s:
            return False
        self._retry_s = now_s + RETRY_S
        return True

    def is_worth_a_block(self, num_tokens: int, block_size: int) -> bool:
        """Whether one more block is loaded faster than so many of its tokens are computed."""
        if self._compute is None or self._load is None:
            return True
        return self._load * block_size < self._compute * num_tokens

    def is_worth_storing(self) -> bool:
        """Whether a block may be of use to this engine later; to be asked once per request."""
        if self._is_loading_faster():
            return True
        now_s = self._clock.monotonic_s()
        if now_s < self._retry_store_s:
            return False
        self._retry_store_s = now_s + RETRY_S
        return True

    def _is_loading_faster(self) -> bool:
        return self._compute is None or self._load is None or self._load < self._compute


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + WEIGHT * (new - old)
