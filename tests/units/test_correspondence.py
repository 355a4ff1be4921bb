"""A stranger of another protocol or layout is answered with both sides' values, and never misread."""

from __future__ import annotations

import msgspec
import pytest
import zmq

from core.clock import SystemClock
from core.layout import PROTOCOL_VERSION, KVLayout
from decode.accounts import Accounts
from decode.admission import Limits
from decode.incoming import Offer
from decode.receiver import Receiver
from engine.correspondence import Correspondence
from engine.settings import ConnectorSettings
from prefill.sender import Sender
from tests.poll import until
from tests.transport.test_control import plane
from transport.faultpoint import FaultPoint
from transport.messages import Accept, Refused, decode_body, decode_envelope, encode
from transport.ports import Ports

LAYOUT = KVLayout("model", "float32", 2, 2, 64, 16, 4096, "LBHNC", "vec")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"protocol": 99}, f"p speaks protocol {PROTOCOL_VERSION}, d 99"),
        ({"protocol": 99, "body": msgspec.Raw(b"\xc0")}, f"p speaks protocol {PROTOCOL_VERSION}, d 99"),
        ({"fingerprint": "another"}, "KV layouts of p and d differ"),
    ],
)
def test_another_protocol_and_another_layout_are_refused_with_both_sides_values(
    change: dict[str, object], why: str
) -> None:
    correspondence = Correspondence(ConnectorSettings(name="p"), LAYOUT.fingerprint(), 1)
    ports = Ports(correspondence.send, lambda: None, lambda report: None, SystemClock(), FaultPoint(None))
    receiver = Receiver(correspondence.me, Offer(LAYOUT, []), ports, Accounts("p", lambda report: None), Limits())
    correspondence.introduce(Sender(correspondence.me, LAYOUT, ports), receiver)
    accept = Accept("h", 20, b"x", 0, [1, 2], 19, [], True, 30.0)
    with plane("d") as (d, heard), zmq.Context() as context, context.socket(zmq.PUSH) as push:
        envelope = decode_envelope(encode(accept, d.peer, LAYOUT.fingerprint()))
        push.connect(correspondence.me.control)
        push.send(msgspec.msgpack.encode(msgspec.structs.replace(envelope, **change)))
        until(lambda: heard.envelopes, 5.0, "an answer")
        refused = decode_body(heard.envelopes[0])
    correspondence.close()
    assert isinstance(refused, Refused)
    assert why in refused.why
    assert (refused.layout is not None) == ("fingerprint" in change)
