"""A decode instance promises only what it can hold beside its running requests."""

from __future__ import annotations

import pytest

from decode.admission import Capacity, Limits, fits

LIMITS = Limits(reserved_share=0.5)


@pytest.mark.parametrize(
    ("free", "growth", "reserved", "needed", "expected"),
    [
        (100, 0, 0, 50, True),  # half of the pool
        (100, 0, 0, 51, True),  # one alone may exceed the share, or it would wait for ever
        (100, 0, 1, 50, False),  # beside another it may not
        (60, 0, 40, 10, True),
        (60, 0, 40, 11, False),
        (30, 20, 0, 10, True),  # room for what runs already is kept free
        (30, 21, 0, 10, False),
        (30, 25, 0, 10, False),
        (5, 0, 0, 10, True),  # nothing runs and nothing is reserved: the engine itself will say no
    ],
)
def test_what_fits(free: int, growth: int, reserved: int, needed: int, expected: bool) -> None:
    assert fits(Capacity(100, free, growth), LIMITS, reserved, needed) is expected
