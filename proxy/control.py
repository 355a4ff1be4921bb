"""What instances and operators talk to: /instances, /status, /requests/{id}, /health, /metrics."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections import Counter
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from core.clock import SystemClock
from core.errors import ProtocolError
from core.handoff import Peer, Role
from core.topology import Heartbeat, InstanceInfo, Welcome
from proxy.admission import Admission
from proxy.arrival import read
from proxy.errors import ErrorAnswer, RequestRefused
from proxy.labels import Labels
from proxy.metrics import Metrics
from proxy.records import Records, show
from proxy.registry import Instance, Registry, State
from proxy.settings import Settings
from proxy.status import status
from transport.keys import read_keys
from transport.seldom import Seldom
from transport.signature import HEADER, check_signature

_MAX_HEARTBEAT_BYTES = 4 << 20
_LOG_INTERVAL_S = 10.0
_log = logging.getLogger(__name__)


class Control:
    """The endpoints beside the OpenAI ones."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        admission: Admission,
        records: Records,
        metrics: Metrics,
        labels: Labels,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._admission = admission
        self._records = records
        self._metrics = metrics
        self._labels = labels
        self._refusals = Seldom(_LOG_INTERVAL_S)
        self._keys = read_keys(settings.keys) if settings.keys else None

    def routes(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/instances", self.post_instance, methods=["POST"], response_model=None)
        router.add_api_route("/instances", self.get_instances, methods=["GET"], response_model=None)
        router.add_api_route("/status", self.get_status, methods=["GET"], response_model=None)
        router.add_api_route("/requests/{request_id}", self.get_request, methods=["GET"], response_model=None)
        router.add_api_route("/health", self.get_health, methods=["GET"], response_model=None)
        router.add_api_route("/metrics", self.get_metrics, methods=["GET"], response_model=None)
        router.add_api_route("/", self.get_root, methods=["GET"], response_model=None)
        return router

    async def post_instance(self, request: Request) -> Response:
        self._check_local(request)
        body = await read(request, _MAX_HEARTBEAT_BYTES)
        try:
            check_signature(self._keys, request.headers.get(HEADER), body, SystemClock().unix_s())
        except ProtocolError as error:
            if self._refusals.is_due(str(error)):
                _log.warning("refused an instance at %s: %s", request.client.host if request.client else "?", error)
            raise RequestRefused(str(error), 403, code="other_keys") from error
        try:
            beat = msgspec.json.decode(body, type=Heartbeat)
            self._registry.heartbeat(beat)
        except (msgspec.DecodeError, ProtocolError) as error:
            raise RequestRefused(f"not a heartbeat: {error}", code="bad_heartbeat") from error
        for report in beat.reports:
            self._records.report(report)
        return _json(Welcome(peers=_senders_to(beat.instance, self._registry)))

    async def get_instances(self, request: Request) -> Response:
        self._check_local(request)
        return _json({"instances": [self._show(instance) for instance in self._registry.all()]})

    async def get_status(self, request: Request) -> Response:
        self._check_local(request)
        return _json(status(self._registry, self._admission.queue_length))

    async def get_request(self, request_id: str) -> Response:
        record = self._records.get(request_id)
        if record is None:
            raise RequestRefused(f"no request {request_id!r} is known (any more)", 404, code="request_not_found")
        if record.status != "running" and record.expects_report:
            try:
                async with asyncio.timeout(self._settings.report_wait_s):
                    await record.reported.wait()
            except TimeoutError:
                pass  # the instance is slow or dead; what is known is shown
        return _json(show(record))

    async def get_health(self) -> Response:
        ready = {role.value: len(self._registry.ready(role)) for role in Role}
        if any(ready.values()):
            return _json({"status": "ok", "ready": ready})
        known = ", ".join(f"{i.name} is {i.state.value}" for i in self._registry.all()) or "none has joined"
        error = ErrorAnswer(503, f"no instance is ready: {known}", "no_instance", retry_after_s=1.0)
        return _json(error.body() | {"status": "waiting", "ready": ready}, 503, error.headers())

    async def get_metrics(self) -> Response:
        instances = self._registry.all()
        self._metrics.load.set_cache(await self._labels.server_figures())
        self._metrics.load.queue.set(self._admission.queue_length)
        self._metrics.load.set_instances(
            Counter((i.role, i.state.value) for i in instances),
            {i.name: i.handoffs for i in instances if i.role is Role.PREFILL},
        )
        self._metrics.paths.set(self._registry.all())
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def get_root(self) -> Response:
        return _json({"name": "baton", "endpoints": ["/v1/chat/completions", "/v1/completions", "/v1/models"]})

    def _check_local(self, request: Request) -> None:
        """Whoever may register an instance may read every prompt, so it must come from this machine."""
        host = request.client.host if request.client else ""
        if self._settings.open_control or _is_loopback(host):
            return
        raise RequestRefused("only this machine may use /instances; start the proxy with --open-control", 403)

    def _show(self, instance: Instance) -> dict[str, Any]:
        return msgspec.structs.asdict(instance.info) | {
            "state": instance.state.value,
            "handoffs": instance.handoffs,
            "serving": instance.serving,
            "suspect": instance.state is State.READY and self._registry.is_suspect(instance),
        }


def _senders_to(info: InstanceInfo, registry: Registry) -> list[Peer]:
    """The prefill instances that may hand off to a decode instance."""
    if info.role is not Role.DECODE or not info.control:
        return []
    senders = [i.info for i in registry.all() if i.role is Role.PREFILL and i.state in (State.STARTING, State.READY)]
    fitting = [sender for sender in senders if sender.control and sender.fingerprint == info.fingerprint]
    return [Peer(sender.name, sender.control, sender.boot_id) for sender in fitting]


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers=headers, media_type="application/json")
