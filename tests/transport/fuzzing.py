"""What the fuzz tests share: how many examples, and how a proper message goes wrong."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FUZZ = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
MUTATIONS = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(1, 255)), min_size=1, max_size=4)


def mutated(content: bytes, changes: list[tuple[int, int]], end: int) -> bytes:
    """Some bytes flipped, and perhaps cut short."""
    changed = bytearray(content)
    for at, flip in changes:
        changed[at % len(changed)] ^= flip
    return bytes(changed[: 1 + end % len(changed)])
