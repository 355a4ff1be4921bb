"""A body is parsed once, guarded, and passed on as it was."""

from __future__ import annotations

import json
from typing import Any

import pytest

from core.handoff import Handoff, Peer, handoff_from_params
from proxy.body import read_body
from proxy.errors import RequestRefused

TICKET = Handoff("req-1", Peer("d", "tcp://d", "b1"))


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"kv_transfer_params": {"baton": {}}}, "kv_transfer_params"),
        ({"kv_transfer_params": False}, "kv_transfer_params"),
        ({"ec_transfer_params": {}}, "ec_transfer_params"),
        ({"baton": 1}, "baton"),
        ({"baton_id": "x"}, "baton_id"),
        ({"vllm_xargs": {"kv_transfer_params": "x"}}, "vllm_xargs.kv_transfer_params"),
        ({"vllm_xargs": {"ec_transfer_params": "x"}}, "vllm_xargs.ec_transfer_params"),
        ({"vllm_xargs": {"baton.id": "x"}}, "vllm_xargs.baton.id"),
        ({"extra_args": {"kv_transfer_params": 1}}, "extra_args.kv_transfer_params"),
        ({"sampling_params": {"extra_args": {"baton": 1}}}, "sampling_params.extra_args.baton"),
    ],
)
def test_the_connectors_fields_are_refused_by_name(body: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestRefused) as refused:
        read_body(json.dumps(body).encode())
    assert (refused.value.status, refused.value.param) == (400, field)


def test_an_escaped_spelling_is_no_way_in() -> None:
    with pytest.raises(RequestRefused):
        read_body(rb'{"kv\u005ftransfer_params": {}}')


def test_nulls_are_dropped_silently_wherever_they_are() -> None:
    body = read_body(b'{"a": 1, "kv_transfer_params": null, "vllm_xargs": {"baton": null, "b": 2}}')
    assert json.loads(body.raw) == {"a": 1, "vllm_xargs": {"b": 2}} == body.fields


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b'"text"', b"null", b"\xff\xfe{}", b"[" * 100_000])
def test_what_is_no_json_object_is_refused_with_400(raw: bytes) -> None:
    with pytest.raises(RequestRefused) as refused:
        read_body(raw)
    assert refused.value.status == 400


@pytest.mark.parametrize(
    "raw",
    [
        b"{}",
        b' { "seed":123456789012345678901234567890,"x" : 1.0e5, "y": "\\u00e9\xc3\xa9 \\ud800" } \r\n',
        b'{"a":{}}',
    ],
)
def test_the_ticket_is_spliced_in_and_no_other_byte_changes(raw: bytes) -> None:
    body = read_body(raw)
    assert body.with_ticket(None) == raw
    sent = body.with_ticket(TICKET)
    assert sent.startswith(raw.rstrip()[:-1])
    fields = json.loads(sent)
    assert handoff_from_params(fields.pop("kv_transfer_params")) == TICKET
    assert fields == json.loads(raw)
