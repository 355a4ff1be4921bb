"""Instances join, health tells what is missing, and one request can be asked about."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from core.clock import ManualClock
from core.handoff import Role
from core.report import FromCache, Report
from core.topology import Heartbeat
from proxy.control import _is_loopback
from proxy.metrics import Metrics
from proxy.records import MAX_RECORDS, Records
from proxy.settings import Settings
from tests.fakes.engine import FakeEngine
from tests.proxy.fleet import Fleet, running, until

Pair = tuple[FakeEngine, FakeEngine]


def test_an_instance_starts_until_it_is_healthy(fleet: Fleet) -> None:
    with FakeEngine(Role.DECODE) as engine:
        engine.behaviour.healthy = False
        fleet.beat(engine)
        assert fleet.state(engine) == "starting"
        health = fleet.client.get("/health")
        assert health.status_code == 503
        assert "decode is starting" in health.json()["error"]["message"]
        engine.behaviour.healthy = True
        until(lambda: fleet.client.get("/health").status_code == 200, "the proxy is healthy")
        assert fleet.client.get("/health").json()["ready"] == {"prefill": 0, "decode": 1}
        assert fleet.metric('baton_instances{role="decode",state="ready"}') == 1
        fleet.beat(engine, leaving=True)
        assert fleet.state(engine) == "leaving"
        assert fleet.complete().status_code == 503


def test_nobody_has_joined_is_said(fleet: Fleet) -> None:
    assert "none has joined" in fleet.client.get("/health").json()["error"]["message"]


def test_a_lost_instance_comes_back_with_its_next_heartbeat(fleet: Fleet, pair: Pair) -> None:
    _, decode = pair
    decode.stop()
    assert fleet.complete().json()["system_fingerprint"] == "prefill-0"
    assert fleet.state(decode) == "lost"
    with FakeEngine(Role.DECODE, decode.name, port=decode.port) as again:
        fleet.join(again)
        assert fleet.complete().json()["system_fingerprint"] == "decode-1"


def test_a_heartbeat_without_an_end_is_refused_and_not_kept(fleet: Fleet) -> None:
    before = _resident_bytes()
    most = [before]

    def endless() -> Iterator[bytes]:
        for _ in range(256):
            yield b" " * (1 << 20)
            most.append(_resident_bytes())

    with contextlib.suppress(httpx.WriteError, httpx.ReadError):
        assert fleet.client.post("/instances", content=endless()).status_code == 413
    assert max(most) - before < 100 << 20


@pytest.mark.parametrize("body", [b"{", b"{}", b'{"instance": {"name": 1}}', b'{"surprise": 1}'])
def test_what_is_no_heartbeat_is_refused_with_the_reason(fleet: Fleet, body: bytes) -> None:
    answer = fleet.client.post("/instances", content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_heartbeat")


@pytest.mark.parametrize(
    ("host", "local"),
    [
        *[(host, True) for host in ("127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1")],
        *[(host, False) for host in ("10.0.0.1", "::ffff:10.0.0.1", "", "localhost", "testclient")],
    ],
)
def test_only_loopback_is_this_machine(host: str, local: bool) -> None:
    assert _is_loopback(host) is local


@pytest.mark.parametrize("open_control", [False, True])
def test_other_hosts_may_register_only_where_told_so(open_control: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(Role.DECODE, "never-started", port=1)
    with running(Settings(open_control=open_control)) as fleet:
        # one machine has no other host: take the loopback's own network for foreign
        monkeypatch.setattr("proxy.control._is_loopback", lambda host: not ipaddress.ip_address(host).is_loopback)
        headers = {"X-Forwarded-For": "10.0.0.1"}
        body = msgspec.json.encode(Heartbeat(engine.info()))
        answer = fleet.client.post("/instances", content=body, headers=headers)
        assert answer.status_code == (200 if open_control else 403)
        assert fleet.client.get("/instances", headers=headers).status_code == (200 if open_control else 403)
        assert fleet.client.get("/metrics").status_code == 200


def report_of(engine: FakeEngine, request_id: str, **fields: object) -> Report:
    values = {"request_id": request_id, "instance": engine.name, "role": engine.role, "outcome": "landed"} | fields
    return msgspec.convert(values, Report)


def test_a_record_tells_the_path_the_tokens_and_the_moments(fleet: Fleet, pair: Pair) -> None:
    prefill, decode = pair
    answer = fleet.chat(stream=True)
    request_id, now_s = answer.headers["x-request-id"], time.time()
    sent: dict[str, Any] = {"handed_over": 99, "detail": {"copy_s": 0.001}}
    fleet.beat(prefill, report_of(prefill, request_id, outcome="sent", moments={"moving": now_s}, **sent))
    kv = {"prompt_tokens": 20, "handed_over": 16, "found_locally": 3, "computed": 1, "num_bytes": 2_000_000}
    moments = {"accepted": now_s - 0.001, "landed": now_s + 0.001}
    detail = {"bytes_before_last_layer": 7.0}
    fleet.beat(decode, report_of(decode, request_id, transport="shm", moments=moments, detail=detail, **kv))
    record = fleet.record(answer)
    assert record["path"] == {"prefill": "prefill-0", "decode": "decode-1", "transport": "shm", "why": ""}
    assert record["tokens"] == {"prompt": 20, "handed_over": 16, "found_locally": 3, "from_cache": 0, "computed": 1}
    assert (record["status"], record["outcome"], record["bytes"]) == ("done", "landed", 2_000_000)
    assert record["gb_per_s"] == pytest.approx(2.0, rel=0.01)
    names = ["queued", "routed", "accepted", "moving", "landed", "first_token", "done"]
    assert list(record["moments_ms"]) == names
    assert record["moments_ms"]["queued"] == 0.0
    assert record["decode"]["bytes_before_last_layer"] == 7.0
    assert record["prefill"]["outcome"] == "sent"
    for source, tokens in [("handed_over", 16), ("found_locally", 3), ("computed", 1)]:
        assert fleet.metric(f'baton_tokens_total{{source="{source}"}}') == tokens
    assert fleet.metric('baton_handoff_bytes_total{transport="shm"}') == 2_000_000
    assert fleet.metric("baton_time_to_first_token_seconds_count") == 1


def test_what_the_cache_gave_is_counted_by_tier_and_once(fleet: Fleet, pair: Pair) -> None:
    answer = fleet.chat()
    given = [
        FromCache("host", tokens=128, num_bytes=4096, seconds=0.002, saved_s=1.5, waited_s=0.001, in_step=True),
        FromCache("disk", tokens=16, num_bytes=512, seconds=0.5, saved_s=-0.25),
    ]
    for _ in range(2):
        report = report_of(pair[1], answer.headers["x-request-id"], prompt_tokens=150, computed=6)
        fleet.beat(pair[1], msgspec.structs.replace(report, from_cache=given))
    record = fleet.record(answer)
    assert record["tokens"]["from_cache"] == 144
    assert record["decode"]["from_cache"][0] == {
        "tier": "host",
        "tokens": 128,
        "bytes": 4096,
        "ms": 2,
        "waited_ms": 1,
        "in_step": True,
        "saved_ms": 1500,
    }
    assert fleet.metric('baton_cache_tokens_total{tier="host"}') == 128
    assert fleet.metric('baton_cache_bytes_total{tier="disk"}') == 512
    assert fleet.metric('baton_cache_load_seconds_count{tier="disk"}') == 1
    assert fleet.metric('baton_cache_load_seconds_sum{tier="disk"}') == 0.5
    assert fleet.metric('baton_cache_saved_seconds_total{tier="host"}') == 1.5
    assert fleet.metric('baton_cache_saved_seconds_total{tier="disk"}') == 0, "a loss is no saving"


def test_tokens_are_never_the_prefill_sides_word(fleet: Fleet, pair: Pair) -> None:
    answer = fleet.chat()
    fleet.beat(pair[0], report_of(pair[0], answer.headers["x-request-id"], handed_over=99, num_bytes=5))
    record = fleet.record(answer)
    assert record["tokens"]["handed_over"] is None
    assert record["bytes"] == 0


def test_a_question_asked_too_early_waits_for_ds_whole_report(fleet: Fleet, pair: Pair) -> None:
    answer = fleet.chat()
    fleet.beat(pair[1], report_of(pair[1], answer.headers["x-request-id"], prompt_tokens=5))
    with fleet.in_background(lambda: fleet.client.get(f"/requests/{answer.headers['x-request-id']}")) as records:
        fleet.beat(pair[1], report_of(pair[1], answer.headers["x-request-id"], prompt_tokens=5, computed=5))
    assert records[0].json()["tokens"]["computed"] == 5


def test_the_latest_report_wins_but_a_cancelled_leg_does_not_undo_its_successor() -> None:
    records = Records(ManualClock(), Metrics())
    record = records.start("req-1", None, "/v1/completions")
    for outcome, computed in [("local", 5), ("fell_back", 7), ("cancelled", 0)]:
        records.report(Report("req-1", "d", Role.DECODE, outcome, computed=computed))
    assert record.reports[Role.DECODE].outcome == "fell_back"
    assert record.reports[Role.DECODE].computed == 7
    records.report(Report("unknown", "d", Role.DECODE, "landed"))


def test_the_last_few_thousand_are_kept_and_no_more() -> None:
    records = Records(ManualClock(), Metrics())
    for number in range(MAX_RECORDS + 1):
        records.start(f"req-{number}", None, "/v1/completions")
    assert records.get("req-0") is None
    assert records.get("req-1") is not None


def test_an_unknown_request_is_a_404_in_openais_format(fleet: Fleet) -> None:
    answer = fleet.client.get("/requests/req-nothing")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "request_not_found")


def test_why_not_handed_off_and_fallbacks_are_counted_by_their_word(fleet: Fleet, pair: Pair) -> None:
    fleet.complete(n=2)
    fleet.complete(tomorrows_field=1)
    answer = fleet.complete()
    request_id = answer.headers["x-request-id"]
    fleet.beat(pair[1], report_of(pair[1], request_id, outcome="fell_back", why="deadline: 60 s", computed=9))
    fleet.beat(pair[1], report_of(pair[1], request_id, outcome="fell_back", why="deadline: 60 s", computed=9))
    assert fleet.metric('baton_not_handed_off_total{why="several_choices"}') == 1
    assert fleet.metric('baton_not_handed_off_total{why="unknown_field"}') == 1
    assert fleet.metric('baton_fallbacks_total{why="deadline"}') == 1
    assert fleet.metric('baton_tokens_total{source="computed"}') == 9
    assert fleet.record(answer)["path"]["why"] == "deadline: 60 s"
    assert fleet.metric('baton_requests_total{path="decode",status="done"}') == 2
    assert fleet.metric('baton_requests_total{path="handoff",status="done"}') == 1


def test_label_values_are_bounded_whatever_instances_say() -> None:
    metrics = Metrics()
    for number in range(200):
        metrics.fell_back(f"word{number}: x")
    metrics.fell_back("x" * 500)
    metrics.fell_back("")
    lines = [line for line in metrics.text().decode().splitlines() if line.startswith("baton_fallbacks_total{")]
    assert len(lines) == 66
    assert 'baton_fallbacks_total{why="other"} 137.0' in lines


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
