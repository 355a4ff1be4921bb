"""How fast this engine computes prompts and loads blocks, as measured: whether loading is worth it.

Both are moving averages of seconds per token; the newest measurement counts a fifth. Where one is not known yet,
loading is taken to be worth it. After it was judged not to be, one load is tried again every RETRY_S, or nothing would
be measured any more. What is not worth loading is not worth storing either, with the same exception.

Threading: the engine's thread alone.
"""

from __future__ import annotations

from core.clock import Clock

WEIGHT = 0.2
MIN_TOKENS = 64
"""Steps with fewer prompt tokens say little about prefill."""

RETRY_S = 30.0


class Pace:
    """Seconds per token of prefill and of loads."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._compute: float | None = None
        self._load: float | None = None
        self._retry_s = 0.0
        self._retry_store_s = 0.0

    def computed(self, num_tokens: int, seconds: float) -> None:
        """A step that computed so many prompt tokens took so long."""
        if num_tokens >= MIN_TOKENS and seconds > 0:
            self._compute = _mean(self._compute, seconds / num_tokens)

    def loaded(self, num_tokens: int, seconds: float) -> None:
        """A load of so many tokens held its request up for so long."""
        if num_tokens > 0 and seconds > 0:
            self._load = _mean(self._load, seconds / num_tokens)

    def compute_s(self, num_tokens: int) -> float | None:
        """What computing so many tokens is likely to take; None while that was never measured."""
        return None if self._compute is None else self._compute * num_tokens

    def load_s(self, num_tokens: int) -> float | None:
        """What loading so many tokens is likely to take; None while that was never measured."""
        return None if self._load is None else self._load * num_tokens

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
