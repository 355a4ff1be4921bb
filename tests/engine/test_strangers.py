"""Two schedulers with different layouts meet over real control planes: the asking side is told both sides' values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest

from core.clock import SystemClock
from core.handoff import Handoff
from core.layout import KVLayout
from core.prompt import Prompt
from decode.accounts import Accounts
from decode.admission import Capacity, Limits
from decode.incoming import Offer
from decode.land import Drop
from decode.receiver import Receiver
from engine.correspondence import Correspondence
from engine.settings import ConnectorSettings
from prefill.sender import Sender
from tests.poll import until
from transport.faultpoint import FaultPoint
from transport.ports import Ports

pytestmark = [pytest.mark.engine, pytest.mark.timeout(60)]

PACKED = KVLayout("m", "bfloat16", 2, 2, 64, 128, 65536, "LBHNC", "amx")


class Side:
    """One instance without an engine."""

    def __init__(self, name: str, layout: KVLayout) -> None:
        self.correspondence = Correspondence(ConnectorSettings(name=name), layout.fingerprint(), 1)
        self.me = self.correspondence.me
        ports = Ports(self.correspondence.send, lambda: None, lambda report: None, SystemClock(), FaultPoint())
        accounts = Accounts(name, ports.report)
        self.receiver = Receiver(self.me, Offer(layout, [[("shm", b"x")]]), ports, accounts, Limits())
        self.correspondence.introduce(Sender(self.me, layout, ports), self.receiver)

    def asks(self, prefill: Side) -> list[Drop]:
        """Asks for a prompt of 300 tokens; what its worker is told in the end."""
        prompt = Prompt("r", Handoff("h", self.me, prefill.me), 300, b"hash")
        assert self.receiver.look_up(prompt, 0, lambda: Capacity(100, 100, 0)) == 299
        self.receiver.reserve("r", list(range(10)), 299, 0)
        drops: list[Drop] = []

        def is_told() -> bool:
            drops.extend(self.receiver.take_commands().drop)
            return bool(drops)

        until(is_told, what="the answer")
        return drops


@contextmanager
def met(ours: KVLayout, theirs: KVLayout) -> Iterator[tuple[Side, Side]]:
    prefill, decode = Side("prefill-0", theirs), Side("decode-0", ours)
    try:
        yield prefill, decode
    finally:
        prefill.correspondence.close()
        decode.correspondence.close()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"block_size": 64, "block_bytes": 32768},
            "block_size: ours 128, theirs 64; block_bytes: ours 65536, theirs 32768",
        ),
        ({"isa": "vec"}, "isa: ours 'amx', theirs 'vec'"),
        ({"num_kv_heads": 4}, "num_kv_heads: ours 2, theirs 4"),
    ],
)
def test_blocks_that_do_not_fit_are_refused_with_both_sides_values(fields: dict[str, Any], said: str) -> None:
    with met(PACKED, msgspec.structs.replace(PACKED, **fields)) as (prefill, decode):
        [drop] = decode.asks(prefill)
    assert drop.fenced, "nobody has written, and nobody will"
    assert drop.why == f"KV layouts of prefill-0 and decode-0 differ: {said}"
