"""One request's life over real connections: both legs, who ends whom, and what the client sees."""

from __future__ import annotations

import json

import httpx
import pytest

from core.handoff import Role, handoff_from_params
from core.report import Report
from proxy.settings import Settings
from tests.fakes.engine import FakeEngine
from tests.proxy.fleet import Fleet, engines, running, until

Pair = tuple[FakeEngine, FakeEngine]


def text_of(response: httpx.Response) -> str:
    """The text of a completion, streamed or not."""
    if not response.headers["content-type"].startswith("text/event-stream"):
        return str(response.json()["choices"][0]["text"])
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    return "".join(c["text"] for event in events for c in event.get("choices", []))


def test_both_legs_get_one_ticket_and_one_id_at_the_same_time(fleet: Fleet, pair: Pair) -> None:
    prefill, decode = pair
    prefill.behaviour.hold = decode.behaviour.hold = True
    with fleet.in_background(lambda: fleet.complete(temperature=0.5)) as answers:
        until(lambda: prefill.received and decode.received, "both have it, though neither has answered")
        prefill.behaviour.hold = decode.behaviour.hold = False
    request_id = answers[0].headers["x-request-id"]
    tickets = [handoff_from_params(e.received[0].body["kv_transfer_params"]) for e in pair]
    assert tickets[0] == tickets[1]
    assert tickets[0] is not None
    assert (tickets[0].id, tickets[0].timeout_s) == (request_id, 60.0)
    assert (tickets[0].decode.name, tickets[0].decode.boot_id) == ("decode-1", "boot-1")
    assert tickets[0].prefill is not None
    assert tickets[0].prefill.name == "prefill-0"
    assert {e.received[0].request_id for e in pair} == {request_id}
    assert prefill.received[0].body["max_tokens"] == 1
    sent = {k: v for k, v in decode.received[0].body.items() if k != "kv_transfer_params"}
    assert sent == {"model": "fake", "prompt": "hello", "max_tokens": 4, "temperature": 0.5}


def test_a_clients_own_id_is_recorded_and_never_used(fleet: Fleet, pair: Pair) -> None:
    headers = {"X-Request-Id": "mine", "Authorization": "Bearer key"}
    body = {"prompt": "hello", "max_tokens": 2}
    first, second = [fleet.client.post("/v1/completions", json=body, headers=headers) for _ in range(2)]
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    assert fleet.record(first)["client_id"] == "mine"
    assert fleet.client.get("/requests/mine").status_code == 404
    for engine in pair:
        assert all(r.headers["authorization"] == "Bearer key" for r in engine.received)
        assert all(r.request_id.startswith("req-") for r in engine.received)


@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_passes_byte_for_byte(fleet: Fleet, pair: Pair, stream: bool) -> None:
    _, decode = pair
    answer = fleet.complete(stream=stream, max_tokens=50, stream_options={"include_usage": True} if stream else None)
    received = decode.received[0]
    if stream:
        expected = b"".join(b"data: " + event + b"\n\n" for event in decode._events(received))
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    else:
        expected = json.dumps(decode._whole(received)).encode()
    assert answer.content == expected


@pytest.mark.parametrize("stream", [False, True])
def test_handed_over_tokens_are_not_shown_as_cached_but_cached_ones_are(fleet: Fleet, pair: Pair, stream: bool) -> None:
    pair[1].behaviour.cached = 6
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    assert '"cached_tokens"' not in fleet.complete(**options).text
    assert '"cached_tokens"' in fleet.complete(**options, echo=True).text


def test_ds_refusal_is_passed_as_it_is_and_cancels_ps_leg(fleet: Fleet, pair: Pair) -> None:
    prefill, decode = pair
    prefill.behaviour.hold = True
    decode.behaviour.status, decode.behaviour.message = 400, "no such adapter"
    answer = fleet.complete()
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "no such adapter")
    until(lambda: prefill.left == [answer.headers["x-request-id"]], "P's leg was closed")
    assert len(decode.received) == 1
    assert fleet.record(answer)["status"] == "failed"


def test_the_first_byte_from_d_ends_ps_leg(fleet: Fleet, pair: Pair) -> None:
    prefill, decode = pair
    prefill.behaviour.hold = True
    decode.behaviour.hold_after = 1
    with fleet.in_background(lambda: fleet.complete(stream=True)) as answers:
        until(lambda: prefill.left, "P's leg was closed while D still streams")
        assert fleet.instance(prefill)["handoffs"] == 0
        decode.behaviour.hold_after = None
    assert text_of(answers[0]) == " t0 t1 t2 t3"


def test_ps_good_end_leaves_d_alone(fleet: Fleet, pair: Pair) -> None:
    prefill, decode = pair
    decode.behaviour.hold = True
    with fleet.in_background(fleet.complete) as answers:
        until(lambda: prefill.received and fleet.instance(prefill)["handoffs"] == 0, "P's place is free")
        assert decode.left == []
        decode.behaviour.hold = False
    assert answers[0].status_code == 200
    assert len(decode.received) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("failure", ["status 500", "status 400", "connection lost", "connection refused"])
def test_ps_failure_sends_d_on_alone_at_once(fleet: Fleet, pair: Pair, failure: str, stream: bool) -> None:
    prefill, decode = pair
    decode.behaviour.hold_body, decode.behaviour.hold = stream, not stream
    if failure == "connection refused":
        prefill.stop()
    prefill.behaviour.cut = failure == "connection lost"
    if failure.startswith("status"):
        prefill.behaviour.status = int(failure[-3:])
    with fleet.in_background(lambda: fleet.complete(stream=stream)) as answers:
        until(lambda: len(decode.received) == 2, "D was asked again")
        until(lambda: len(decode.left) == 1, "and its first leg closed")
        decode.behaviour.hold_body = decode.behaviour.hold = False
    assert text_of(answers[0]) == " t0 t1 t2 t3"
    again = handoff_from_params(decode.received[1].body["kv_transfer_params"])
    assert again is not None
    assert again.prefill is None
    assert fleet.record(answers[0])["path"]["why"].startswith(f"prefill_failed:{failure}")
    assert fleet.metric('baton_fallbacks_total{why="prefill_failed"}') == 1
    if failure == "connection refused":
        assert fleet.state(prefill) == "lost"


def test_a_decode_that_says_it_goes_on_alone_is_not_asked_again() -> None:
    impatient = Settings(health_poll_s=0.02, report_wait_s=0.1, takeover_s=0.0)
    with running(impatient) as fleet, engines(Role.PREFILL, Role.DECODE) as (prefill, decode):
        fleet.join(prefill, decode)
        prefill.behaviour.hold = decode.behaviour.hold = True
        prefill.behaviour.status = 500
        with fleet.in_background(fleet.complete) as answers:
            until(lambda: prefill.received and decode.received, "both have it")
            why = "peer_lost"
            fleet.beat(decode, Report(decode.received[0].request_id, decode.name, Role.DECODE, "fell_back", why))
            prefill.behaviour.hold = False
            until(lambda: fleet.instance(prefill)["suspect"], "P has failed")
            decode.behaviour.hold = False
        assert answers[0].status_code == 200
        assert (len(decode.received), decode.left) == (1, [])
        assert fleet.record(answers[0])["path"]["why"] == "peer_lost"
        assert fleet.metric('baton_fallbacks_total{why="peer_lost"}') == 1


def test_ps_failure_after_ds_first_byte_is_ignored(fleet: Fleet, pair: Pair) -> None:
    prefill, decode = pair
    prefill.behaviour.hold, prefill.behaviour.status = True, 500
    decode.behaviour.hold_after = 2
    with fleet.in_background(lambda: fleet.complete(stream=True)) as answers:
        until(lambda: prefill.left, "D's first byte has come")
        prefill.behaviour.hold = False
        decode.behaviour.hold_after = None
    assert text_of(answers[0]) == " t0 t1 t2 t3"
    assert len(decode.received) == 1
    assert fleet.record(answers[0])["path"]["why"] == ""


@pytest.mark.parametrize("failure", ["status 500", "connection lost", "connection refused", "broken stream"])
def test_a_decode_that_fails_before_its_first_byte_is_replaced(fleet: Fleet, pair: Pair, failure: str) -> None:
    prefill, decode = pair
    prefill.behaviour.hold = True
    decode.behaviour.status = 500 if failure == "status 500" else 200
    decode.behaviour.cut = failure == "connection lost"
    decode.behaviour.break_after = 0 if failure == "broken stream" else None
    if failure == "connection refused":
        decode.stop()
    with FakeEngine(Role.DECODE, "other") as other:
        fleet.join(other)
        fleet.proxy.registry.mark_suspect(next(i for i in fleet.proxy.registry.all() if i.name == "other"))
        answer = fleet.complete(stream=failure == "broken stream")
        assert text_of(answer) == " t0 t1 t2 t3"
        record = fleet.record(answer)
        assert [r["instance"] for r in record["resumed"]] == ["other"]
        assert record["path"]["decode"] == "other"
        until(lambda: prefill.received == [] or prefill.left, "P's leg was closed")
        alone = handoff_from_params(other.received[0].body["kv_transfer_params"])
        assert alone is not None
        assert (alone.prefill, alone.decode.name) == (None, "other")


def test_another_decode_is_asked_once_and_then_a_prefill(fleet: Fleet, pair: Pair) -> None:
    with FakeEngine(Role.DECODE, "other") as other:
        fleet.join(other)
        pair[1].behaviour.status = other.behaviour.status = 500
        answer = fleet.complete(echo=True)
        assert answer.json()["system_fingerprint"] == "prefill-0"
        assert {r["instance"] for r in fleet.record(answer)["resumed"]} <= {"other", "decode-1", "prefill-0"}
        assert (len(pair[1].received), len(other.received)) == (1, 1)


def test_with_no_other_decode_a_prefill_serves_and_then_the_error_passes(fleet: Fleet, pair: Pair) -> None:
    prefill, decode = pair
    decode.behaviour.status = 500
    answer = fleet.complete(echo=True)
    assert answer.json()["system_fingerprint"] == "prefill-0"
    record = fleet.record(answer)
    assert record["resumed"] == [{"instance": "prefill-0", "why": "decode-1: status 500"}]
    assert (record["path"]["prefill"], record["path"]["decode"]) == ("prefill-0", None)
    prefill.behaviour.status = 503
    answer = fleet.complete(echo=True)
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "told to fail")


def test_nobody_left_is_a_503_in_openais_format(fleet: Fleet, pair: Pair) -> None:
    for engine in pair:
        engine.stop()
    answer = fleet.complete()
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "instance_lost"
    answer = fleet.complete()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_instance")
    assert int(answer.headers["retry-after"]) >= 1


def test_a_stream_that_breaks_off_ends_with_an_error_event(fleet: Fleet, pair: Pair) -> None:
    pair[1].behaviour.break_after = 2
    answer = fleet.complete(stream=True)
    *events, done = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert done == "[DONE]"
    assert json.loads(events[-1])["error"]["code"] == "instance_lost"
    texts = [json.loads(event)["choices"][0]["text"] for event in events[:-1]]
    assert texts == [" t0", " t1"][: len(texts)], "what had come when the connection was cut"
    assert texts
    assert fleet.record(answer)["status"] == "failed"


@pytest.mark.parametrize("stream", [False, True])
def test_one_token_comes_from_p_alone_as_the_client_asked(fleet: Fleet, pair: Pair, stream: bool) -> None:
    prefill, decode = pair
    answer = fleet.complete(max_tokens=1, logprobs=2, stream=stream)
    assert text_of(answer) == " t0"
    assert decode.received == []
    assert prefill.received[0].body["logprobs"] == 2
    ticket = handoff_from_params(prefill.received[0].body["kv_transfer_params"])
    assert ticket is not None
    assert (ticket.prefill, ticket.decode.name) == (None, "prefill-0")
    assert fleet.record(answer)["path"]["why"] == "one_token"
    prefill.behaviour.status = 500
    assert fleet.complete(max_tokens=1).json()["system_fingerprint"] == "decode-1"


def test_instances_without_a_control_address_get_no_ticket(fleet: Fleet) -> None:
    with FakeEngine(Role.DECODE, "plain", control="") as plain:
        fleet.join(plain)
        answer = fleet.complete(tomorrows_field=1)
        assert plain.received[0].raw == answer.request.content
        assert fleet.record(answer)["path"]["why"] == "unknown_field:tomorrows_field"


def test_an_instance_that_starts_anew_takes_over_what_hung_on_the_old(fleet: Fleet, pair: Pair) -> None:
    _, decode = pair
    decode.behaviour.hold = True
    with engines(Role.DECODE) as (other,), fleet.in_background(lambda: fleet.complete(echo=True)) as answers:
        until(lambda: decode.received, "D has it")
        fleet.join(other)
        decode.boot_id = "boot-2"
        fleet.beat(decode)
    assert answers[0].json()["system_fingerprint"] == "decode-0"
    assert fleet.record(answers[0])["resumed"][0]["why"].endswith("replaced by a newer start")


def test_a_report_of_d_frees_ps_place_while_ps_leg_still_runs(fleet: Fleet, pair: Pair) -> None:
    prefill, decode = pair
    prefill.behaviour.hold = decode.behaviour.hold = True
    with fleet.in_background(fleet.complete):
        until(lambda: prefill.received and decode.received, "both have it")
        assert fleet.instance(prefill)["handoffs"] == 1
        fleet.beat(decode, Report(decode.received[0].request_id, decode.name, Role.DECODE, "landed"))
        assert fleet.instance(prefill)["handoffs"] == 0
        prefill.behaviour.hold = decode.behaviour.hold = False
