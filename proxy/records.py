"""What became of the last few thousand requests: the source of `GET /requests/{id}`.

The proxy stamps its own moments; everything about the KV cache comes from the instances' reports, and the tokens from
the decode side's alone: what was asked for is never shown as what was received.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from core.clock import Clock
from core.handoff import Role
from core.report import Report
from proxy.metrics import Metrics, tokens_from_cache
from proxy.registry import Instance
from proxy.router import Route

MAX_RECORDS = 4096
_MOMENTS = ("queued", "routed", "accepted", "moving", "last_layer", "landed", "first_token", "done")


class Record:
    """One request. `when_reported` is called at each report of the decode side.

    heard: the decode side has said something; reported: it has said everything. is_whole: the client has been sent
    the end of its stream, and may hang up before we do. contexts: (id, `prefix` or `recomputed`) in their order.
    """

    def __init__(self, request_id: str, client_id: str | None, endpoint: str, now_s: float) -> None:
        self.id = request_id
        self.client_id = client_id
        self.endpoint = endpoint
        self.status = "running"
        self.moments = {"queued": now_s}
        self.route: Route | None = None
        self.server: Instance | None = None
        self.why = ""
        self.resumed: list[dict[str, str]] = []
        self.contexts: tuple[tuple[str, str], ...] = ()
        self.reports: dict[Role, Report] = {}
        self.when_reported: Callable[[], None] = lambda: None
        self.is_whole = False
        self.heard = asyncio.Event()
        self.reported = asyncio.Event()

    @property
    def path(self) -> str:
        """For the metric: who was meant to do it."""
        if self.route is None:
            return "none"
        return "handoff" if self.route.prefill is not None else self.route.server.role.value

    @property
    def expects_report(self) -> bool:
        return self.server is not None and bool(self.server.info.control) and not self.reported.is_set()


class Records:
    """The last MAX_RECORDS requests by id."""

    def __init__(self, clock: Clock, metrics: Metrics) -> None:
        self._clock = clock
        self._metrics = metrics
        self._records: OrderedDict[str, Record] = OrderedDict()

    def start(self, request_id: str, client_id: str | None, endpoint: str) -> Record:
        record = Record(request_id, client_id, endpoint, self._clock.unix_s())
        self._records[request_id] = record
        if len(self._records) > MAX_RECORDS:
            self._records.popitem(last=False)
        return record

    def get(self, request_id: str) -> Record | None:
        return self._records.get(request_id)

    def routed(self, record: Record, route: Route) -> None:
        record.route = route
        record.server = route.server
        record.why = route.why
        self.stamp(record, "routed")
        self._metrics.queue_wait_s.observe(record.moments["routed"] - record.moments["queued"])
        if route.prefill is None:
            self._metrics.not_handed_off(route.why)

    def stamp(self, record: Record, moment: str) -> None:
        record.moments[moment] = self._clock.unix_s()

    def first_token(self, record: Record, streamed: bool) -> None:
        self.stamp(record, "first_token")
        if streamed:
            self._metrics.first_token_s.observe(record.moments["first_token"] - record.moments["queued"])

    def prefill_failed(self, record: Record, why: str) -> None:
        """P's leg ended in an error before anything was answered; D has been asked again, without it."""
        record.why = f"prefill_failed:{why}"
        self._metrics.fell_back(record.why)

    def resumed(self, record: Record, server: Instance, why: str) -> None:
        """Another instance answers now, because the one before could not."""
        record.server = server
        record.resumed.append({"instance": server.name, "why": why})

    def finish(self, record: Record, status: str) -> None:
        record.status = status
        self.stamp(record, "done")
        self._metrics.requests.labels(record.path, status).inc()

    def report(self, report: Report) -> None:
        """Takes one instance's account; one of a request that is not known (any more) is dropped."""
        record = self._records.get(report.request_id)
        if record is None:
            return
        old = record.reports.get(report.role)
        if old is not None and report.outcome == "cancelled" and old.outcome != "cancelled":
            return  # of a leg that was given up; the one that took its place may have reported first
        record.reports[report.role] = report
        if report.role is Role.DECODE:
            self._metrics.decode_report(report, old)
            record.heard.set()
            if _is_complete(report):
                record.reported.set()
            record.when_reported()


def _is_complete(report: Report) -> bool:
    """Every prompt token is accounted for, or nobody waits for it any more."""
    counted = report.handed_over + report.found_locally + tokens_from_cache(report) + report.computed
    return report.outcome == "cancelled" or counted >= report.prompt_tokens > 0


def show(record: Record) -> dict[str, Any]:
    """The record as JSON; see docs/ for its fields."""
    decode, prefill = record.reports.get(Role.DECODE), record.reports.get(Role.PREFILL)
    moments = {**_moments_of(prefill), **_moments_of(decode), **record.moments}
    queued = moments["queued"]
    return {
        "id": record.id,
        "client_id": record.client_id,
        "endpoint": record.endpoint,
        "status": record.status,
        "path": _path(record, decode),
        "tokens": _tokens(decode),
        "bytes": decode.num_bytes if decode else 0,
        "outcome": decode.outcome if decode else None,
        "moments_ms": {name: (moments[name] - queued) * 1e3 for name in _MOMENTS if name in moments},
        "gb_per_s": _gb_per_s(decode, prefill),
        "prefill": _account(prefill, queued),
        "decode": _account(decode, queued),
        "resumed": record.resumed,
        "contexts": [{"id": id_, "reuse": reuse} for id_, reuse in record.contexts],
    }


def _path(record: Record, decode: Report | None) -> dict[str, str | None]:
    prefill, server = record.route.prefill if record.route else None, record.server
    if server is not None and server.role is Role.PREFILL:
        prefill, server = server, None
    return {
        "prefill": prefill.name if prefill else None,
        "decode": server.name if server else None,
        "transport": decode.transport if decode else "",
        "why": record.why or (decode.why if decode else ""),
    }


def _tokens(decode: Report | None) -> dict[str, int | None]:
    if decode is None:
        return dict.fromkeys(("prompt", "handed_over", "found_locally", "from_cache", "computed"))
    return {
        "prompt": decode.prompt_tokens,
        "handed_over": decode.handed_over,
        "found_locally": decode.found_locally,
        "from_cache": tokens_from_cache(decode),
        "computed": decode.computed,
    }


def _moments_of(report: Report | None) -> dict[str, float]:
    return {name: at for name, at in report.moments.items() if name in _MOMENTS} if report else {}


def _gb_per_s(decode: Report | None, prefill: Report | None) -> float | None:
    """Of one copying thread, where the prefill instance copies (shm); elsewhere nobody sees the bytes move."""
    seconds = prefill.detail.get("copy_s", 0.0) if prefill else 0.0
    return decode.num_bytes / seconds / 1e9 if decode is not None and seconds > 0 else None


def _account(report: Report | None, queued_s: float) -> dict[str, Any] | None:
    if report is None:
        return None
    return {
        "instance": report.instance,
        "outcome": report.outcome,
        "why": report.why,
        "bytes": report.num_bytes,
        "from_cache": [
            {
                "tier": part.tier,
                "tokens": part.tokens,
                "bytes": part.num_bytes,
                "ms": part.seconds * 1e3,
                "waited_ms": part.waited_s * 1e3,
                "in_step": part.in_step,
                "saved_ms": part.saved_s * 1e3,
            }
            for part in report.from_cache
        ],
        "moments_ms": {name: (at - queued_s) * 1e3 for name, at in report.moments.items()},
        **report.detail,
    }
