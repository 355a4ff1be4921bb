"""Receives that the library completes by and by, as over RDMA: the notice waits for them, and so does the fence.

Here by a rendezvous over TCP, which Baton itself never uses: each comes to its end, or UCX might crash.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.poll import until
from tests.transport.memory import Owned
from tests.transport.ucx_stranger import Stranger
from transport import schemes, ucx_library
from transport.base import Landing
from transport.frames import Notice
from transport.ucx import UcxTransport
from transport.ucx_library import Lease
from transport.ucx_wire import Parcel, Part, decode_description
from transport.ucx_worker import UcxWorker

pytestmark = [
    pytest.mark.ucx,
    pytest.mark.skipif(bool(schemes.unavailable("ucx")), reason=schemes.unavailable("ucx")),
]


class Announced:
    """A receiver, and a sender that announces a block and moves it only in `progress`."""

    def __init__(self) -> None:
        self.receiver = Owned(UcxTransport("127.0.0.1"))
        self._lease = Lease("127.0.0.1")
        self.stranger = Stranger(UcxWorker(self._lease), decode_description(self.receiver.transport.describe()))

    def announce(self, tag: str) -> Landing:
        """The landing of a block that is being received."""
        landing = self.receiver.expect(tag, [1])
        self.stranger.frames(Parcel(0, tag, [Part(0, [1], 0, 4096)]), Notice(1, tag, b"end"))
        self.stranger.payload(0, 4096)

        def has_begun() -> bool:
            if landing._num_held:  # type: ignore[attr-defined]
                return True
            self.stranger.progress()
            return False

        until(has_begun, 5.0, "the receive has begun")
        return landing

    def close(self) -> None:
        self.stranger.close_at_once()
        self.receiver.transport.close()
        self._lease.give_back()


@pytest.fixture
def announced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Announced]:
    monkeypatch.setenv("UCX_RNDV_THRESH", "512")
    monkeypatch.setenv("UCX_RNDV_SCHEME", "auto")
    monkeypatch.setattr(ucx_library, "_FIXED", frozenset())
    announced = Announced()
    yield announced
    announced.close()


def test_a_notice_waits_for_the_data_before_it(announced: Announced) -> None:
    landing = announced.announce("t")
    for _ in range(10):
        assert landing.poll() == []
        announced.receiver.transport._io.wake()  # type: ignore[attr-defined]
    assert landing.num_written() == 0
    notices: list[bytes] = []

    def has_come() -> bool:
        announced.stranger.progress()
        notices.extend(landing.poll())
        return bool(notices)

    until(has_come, 5.0, "the notice comes")
    assert announced.receiver.block(1) == b"\x07" * 4096
    assert landing.num_written() == 1
    assert landing.close() is True


def test_a_landing_closes_only_when_the_library_has_let_go_of_its_blocks(announced: Announced) -> None:
    landing = announced.announce("t")
    assert landing.close() is False

    def has_closed() -> bool:
        announced.stranger.progress()
        return landing.close()

    until(has_closed, 5.0, "the receive has ended")
    assert landing.num_written() == 0, "what came after the close does not count"
