"""What the fuzz tests share: how many examples, and how a proper message goes wrong."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from transport.frames import Ask, Data, Notice
from transport.ucx_wire import Parcel, Part

FUZZ = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FRAMES = st.one_of(
    st.builds(
        Data,
        st.integers(0, 100),
        st.sampled_from(["t", "other", ""]),
        st.integers(0, 2),
        st.lists(st.integers(0, 9), min_size=1, max_size=3),
        st.integers(0, 5000),
        st.integers(1, 5000),
    ),
    st.builds(Notice, st.integers(0, 100), st.sampled_from(["t", "other"]), st.binary(max_size=10)),
    st.builds(
        Ask, st.integers(0, 100), st.integers(0, 2), st.lists(st.integers(0, 9), min_size=1), st.just(0), st.just(4096)
    ),
)
"""Frames of zmq, well-formed and mostly of nothing that is expected."""

UCX_FRAMES = st.one_of(
    FRAMES.filter(lambda frame: not isinstance(frame, Data)),
    st.builds(
        Parcel,
        st.integers(0, 100),
        st.sampled_from(["t", "other", ""]),
        st.lists(
            st.builds(
                Part,
                st.integers(0, 2),
                st.lists(st.integers(0, 9), min_size=1, max_size=3),
                st.integers(0, 5000),
                st.integers(1, 5000),
            ),
            min_size=1,
            max_size=3,
        ),
    ),
)
"""The same of ucx."""

MUTATIONS = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(1, 255)), min_size=1, max_size=4)


def mutated(content: bytes, changes: list[tuple[int, int]], end: int) -> bytes:
    """Some bytes flipped, and perhaps cut short."""
    changed = bytearray(content)
    for at, flip in changes:
        changed[at % len(changed)] ^= flip
    return bytes(changed[: 1 + end % len(changed)])
