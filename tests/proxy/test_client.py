"""What clients may do and get: leave at any moment, wait in the queue, be refused, ask other endpoints."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from core.handoff import Role
from proxy.settings import Settings
from tests.fakes.engine import FakeEngine
from tests.proxy.fleet import Fleet, engines, running, until

Pair = tuple[FakeEngine, FakeEngine]
BODY: dict[str, Any] = {"prompt": "hello", "max_tokens": 4}


class Leaver:
    """A client that asks in a thread and goes away when told to."""

    def __init__(self, fleet: Fleet, body: dict[str, Any]) -> None:
        self.client = httpx.Client(base_url=fleet.url, timeout=20.0, trust_env=False, verify=False)
        self.body = body
        self.chunks: list[bytes] = []
        self.thread = threading.Thread(target=self._ask, daemon=True)
        self.thread.start()

    def _ask(self) -> None:
        with (
            contextlib.suppress(httpx.HTTPError, OSError, ValueError),
            self.client.stream("POST", "/v1/completions", json=self.body) as answer,
        ):
            self.answer = answer
            self.chunks.extend(answer.iter_raw())

    def leave(self) -> None:
        for connection in self.client._transport._pool.connections:  # type: ignore[attr-defined]
            sock = connection._connection._network_stream.get_extra_info("socket")
            sock.shutdown(socket.SHUT_RDWR)
        self.thread.join(5)
        self.client.close()
        assert not self.thread.is_alive()


@pytest.mark.parametrize("moment", ["before the answer", "before the first byte", "in the stream"])
def test_a_client_that_leaves_ends_both_legs_at_once(fleet: Fleet, pair: Pair, moment: str) -> None:
    prefill, decode = pair
    prefill.behaviour.hold = True
    decode.behaviour.hold = moment == "before the answer"
    decode.behaviour.hold_body = moment == "before the first byte"
    decode.behaviour.hold_after = 1
    leaver = Leaver(fleet, BODY | {"stream": True})
    until(lambda: decode.received and prefill.received, "both have it")
    until(lambda: leaver.chunks or moment != "in the stream", "the stream has begun")
    leaver.leave()
    until(lambda: decode.left and prefill.left, "both legs are closed")
    request_id = decode.received[0].request_id
    record = fleet.client.get(f"/requests/{request_id}").json()
    assert record["status"] == "cancelled"
    assert fleet.metric('baton_requests_total{path="handoff",status="cancelled"}') == 1


@contextlib.contextmanager
def narrow(**settings: Any) -> Iterator[tuple[Fleet, FakeEngine, FakeEngine]]:
    """A fleet with little room, both of whose engines hold."""
    settings |= {"health_poll_s": 0.02, "report_wait_s": 0.01}
    with running(Settings(**settings)) as fleet, engines(Role.PREFILL, Role.DECODE) as (prefill, decode):
        fleet.join(prefill, decode)
        prefill.behaviour.hold = decode.behaviour.hold = True
        yield fleet, prefill, decode


def test_beyond_the_window_requests_wait_in_the_proxy_and_beyond_the_queue_they_get_429() -> None:
    with narrow(window=2, queue_limit=1) as (fleet, prefill, decode):
        with contextlib.ExitStack() as stack:
            answers = [stack.enter_context(fleet.in_background(fleet.complete)) for _ in range(3)]
            until(lambda: fleet.proxy.admission.queue_length == 1, "one waits")
            until(lambda: (len(prefill.received), len(decode.received)) == (2, 2), "two are under way")
            refused = fleet.complete()
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "overloaded"
            assert int(refused.headers["retry-after"]) >= 1
            assert fleet.metric("baton_queue_length") == 1
            assert fleet.metric('baton_outstanding_handoffs{instance="prefill-0"}') == 2
            prefill.behaviour.hold = decode.behaviour.hold = False
        assert [a[0].status_code for a in answers] == [200] * 3
        assert len(decode.received) == 3


def test_requests_that_one_decode_answers_are_bounded_too() -> None:
    with narrow(in_flight_limit=1, queue_limit=0) as (fleet, _, decode):
        with fleet.in_background(lambda: fleet.complete(echo=True)) as answers:
            until(lambda: decode.received, "D has one")
            assert fleet.complete(echo=True).status_code == 429
            decode.behaviour.hold = False
        assert answers[0].status_code == 200


def test_a_client_that_hangs_up_right_behind_the_end_of_its_stream_has_been_served(fleet: Fleet, pair: Pair) -> None:
    _, decode = pair
    decode.behaviour.hold_end = True
    with fleet.client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as answer:
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                break
    until(lambda: fleet.record(answer)["status"] != "running", "it has ended")
    assert fleet.record(answer)["status"] == "done"
    decode.behaviour.hold_end = False


def test_a_client_that_leaves_the_queue_never_reaches_an_instance() -> None:
    with narrow(window=1) as (fleet, prefill, decode):
        with fleet.in_background(fleet.complete) as answers:
            until(lambda: prefill.received, "one is under way")
            leaver = Leaver(fleet, BODY)
            until(lambda: fleet.proxy.admission.queue_length == 1, "one waits")
            leaver.leave()
            until(lambda: fleet.proxy.admission.queue_length == 0, "it has left the queue")
            prefill.behaviour.hold = decode.behaviour.hold = False
        assert answers[0].status_code == 200
        assert len(decode.received) == 1


def test_those_who_wait_for_a_prefill_that_leaves_go_on_without_it() -> None:
    with narrow(window=1) as (fleet, prefill, decode), contextlib.ExitStack() as stack:
        for number in range(2):
            stack.enter_context(fleet.in_background(fleet.complete))
            until(lambda number=number: len(decode.received) + fleet.proxy.admission.queue_length > number, "it is in")  # type: ignore[misc]
        fleet.beat(prefill, leaving=True)
        until(lambda: len(decode.received) == 2, "the second has reached D")
        prefill.behaviour.hold = decode.behaviour.hold = False


def test_short_prompts_go_to_d_alone_where_a_threshold_is_set() -> None:
    with narrow(threshold=50) as (fleet, prefill, decode):
        prefill.behaviour.hold = decode.behaviour.hold = False
        answer = fleet.complete()
        assert prefill.received == []
        assert fleet.record(answer)["path"]["why"] == "short_prompt"
        decode.behaviour.hold = True
        with fleet.in_background(lambda: fleet.complete(prompt="word " * 50)):
            until(lambda: prefill.received, "P has the long one")
            decode.behaviour.hold = False


def test_the_connectors_fields_are_refused_on_every_way_in(fleet: Fleet, pair: Pair) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"kv_transfer_params": {"baton": {}}}, "kv_transfer_params"),
        ({"ec_transfer_params": {"x": 1}}, "ec_transfer_params"),
        ({"n": 2, "vllm_xargs": {"kv_transfer_params": "x"}}, "vllm_xargs.kv_transfer_params"),
        ({"max_tokens": 1, "baton": {}}, "baton"),
    ]
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize"):
        for body, param in refused:
            answer = fleet.client.post(path, json=BODY | body)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
            assert param in error["message"]
    assert [e.received for e in pair] == [[], []]


def test_what_is_no_json_object_is_a_400(fleet: Fleet, pair: Pair) -> None:
    for content in (b"{", b"[]", b"\xff"):
        answer = fleet.client.post("/v1/completions", content=content)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
    odd = fleet.client.post("/v1/completions", content=rb'{"baton\ud800": 1}')
    assert odd.status_code == 400


def test_a_body_over_the_bound_is_a_413(fleet: Fleet, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.arrival.MAX_BODY_BYTES", 100)
    answer = fleet.complete(prompt="x" * 100)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_unknown_paths_and_methods_are_errors_in_openais_format(fleet: Fleet) -> None:
    assert fleet.client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    answer = fleet.client.get("/v1/completions")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")


def test_a_crash_is_a_500_in_openais_format(fleet: Fleet, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr("proxy.flow.why_not_handed_off", crash)
    answer = fleet.complete()
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text


def test_models_and_vllms_other_endpoints_pass_through(fleet: Fleet, pair: Pair) -> None:
    assert fleet.client.get("/v1/models").json()["data"][0]["owned_by"] == "decode-1"
    answer = fleet.client.post("/v1/embeddings", json={"input": "x"}).json()
    assert answer == {"path": "/v1/embeddings", "body": {"input": "x"}, "by": "decode-1"}
    pair[1].stop()
    assert fleet.client.post("/tokenize", json={"prompt": "x"}).json()["by"] == "prefill-0"
    pair[0].stop()
    assert fleet.client.get("/v1/models").status_code == 503
