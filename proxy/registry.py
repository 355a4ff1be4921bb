"""The instances that have joined, and which of them can be used.

    heartbeat ──> STARTING ──/health is 200──> READY ──no heartbeat, refused──> LOST
                     ^                                                           │
                     └───────────────────────── heartbeat ───────────────────────┘
    any ──heartbeat says so──> LEAVING            a new boot id under a name replaces the old instance

Everything here runs on the event loop's thread; nothing is locked. An instance that goes for good (replaced, silent for
long) aborts the legs that hang on it, so no request waits for the dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import Awaitable, Callable
from typing import Protocol

from core.clock import Clock
from core.errors import ProtocolError
from core.handoff import Role
from core.topology import Heartbeat, InstanceInfo
from proxy.settings import Settings

MAX_INSTANCES = 1024
_FORGET_AFTER_S = 60.0


class State(enum.Enum):
    """See the drawing above."""

    STARTING = "starting"
    READY = "ready"
    LOST = "lost"
    LEAVING = "leaving"


class Abortable(Protocol):
    """Something under way towards an instance."""

    def abort(self, why: str) -> None: ...


class Instance:
    """One instance, what it said last, and what the proxy has given it.

    handoffs: prompts that it is computing for others. serving: requests that it answers.
    """

    def __init__(self, info: InstanceInfo, now_s: float) -> None:
        self.info = info
        self.state = State.STARTING
        self.seen_s = now_s
        self.suspect_until_s = 0.0
        self.handoffs = 0
        self.serving = 0
        self.picked = 0
        self.legs: set[Abortable] = set()

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def role(self) -> Role:
        return self.info.role

    @property
    def outstanding(self) -> int:
        return self.handoffs + self.serving

    def abort_legs(self, why: str) -> None:
        for leg in list(self.legs):
            leg.abort(why)


Probe = Callable[[str], Awaitable[bool]]
"""Asks a base address whether its server is healthy."""


class Registry:
    """All instances by name. `on_change` is called whenever one has become usable or unusable."""

    def __init__(self, settings: Settings, clock: Clock, probe: Probe) -> None:
        self._settings = settings
        self._clock = clock
        self._probe = probe
        self._instances: dict[str, Instance] = {}
        self._probing: dict[Instance, asyncio.Task[None]] = {}
        self.on_change: Callable[[], None] = lambda: None

    def all(self) -> list[Instance]:
        return list(self._instances.values())

    def ready(self, role: Role) -> list[Instance]:
        return [i for i in self._instances.values() if i.role is role and i.state is State.READY]

    def is_suspect(self, instance: Instance) -> bool:
        return self._clock.monotonic_s() < instance.suspect_until_s

    def heartbeat(self, beat: Heartbeat) -> None:
        """Takes one instance's word. Raises ProtocolError if it cannot be true or there are too many."""
        info = beat.instance
        if not info.name or not info.boot_id or not info.url.startswith(("http://", "https://")):
            raise ProtocolError(f"an instance needs a name, a boot_id and an http url; got {info!r}")
        instance = self._instances.get(info.name)
        if instance is None or _is_another(instance.info, info):
            instance = self._join(info)
        instance.info = info
        instance.seen_s = self._clock.monotonic_s()
        if beat.leaving:
            self._set_state(instance, State.LEAVING)
        elif instance.state in (State.LOST, State.LEAVING):
            self._set_state(instance, State.STARTING)
        if instance.state is State.STARTING and instance not in self._probing:
            self._probing[instance] = asyncio.create_task(self._wait_until_healthy(instance))

    def _join(self, info: InstanceInfo) -> Instance:
        if len(self._instances) >= MAX_INSTANCES and info.name not in self._instances:
            raise ProtocolError(f"{MAX_INSTANCES} instances have joined; no more are taken")
        old = self._instances.pop(info.name, None)
        instance = Instance(info, self._clock.monotonic_s())
        self._instances[info.name] = instance
        if old is not None:
            self._set_state(old, State.LOST)
            old.abort_legs("replaced by a newer start")
        return instance

    def mark_lost(self, instance: Instance) -> None:
        """Its address refuses connections: no new requests until a heartbeat."""
        if instance.state is not State.LEAVING:
            self._set_state(instance, State.LOST)

    def mark_suspect(self, instance: Instance) -> None:
        """It failed a request: others are preferred for a while."""
        instance.suspect_until_s = self._clock.monotonic_s() + self._settings.suspect_s

    def check_silence(self) -> None:
        """Marks the silent lost, gives up what hangs on those silent for long, and forgets them later."""
        now_s = self._clock.monotonic_s()
        for instance in self.all():
            silent_s = now_s - instance.seen_s
            if silent_s > self._settings.lost_after_s and instance.state is not State.LOST:
                self._set_state(instance, State.LOST)
            if silent_s > self._settings.gone_after_s:
                instance.abort_legs(f"silent for {silent_s:.0f} s")
            if silent_s > self._settings.gone_after_s + _FORGET_AFTER_S:
                del self._instances[instance.name]

    async def watch(self) -> None:
        """Runs until cancelled."""
        while True:
            self.check_silence()
            await asyncio.sleep(self._settings.health_poll_s)

    async def close(self) -> None:
        for task in self._probing.values():
            task.cancel()
        for task in list(self._probing.values()):
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _wait_until_healthy(self, instance: Instance) -> None:
        try:
            while instance.state is State.STARTING:
                if await self._probe(instance.info.url):
                    if instance.state is State.STARTING:
                        self._set_state(instance, State.READY)
                    return
                await asyncio.sleep(self._settings.health_poll_s)
        finally:
            del self._probing[instance]

    def _set_state(self, instance: Instance, state: State) -> None:
        if instance.state is not state:
            instance.state = state
            self.on_change()


def _is_another(old: InstanceInfo, new: InstanceInfo) -> bool:
    """True if anything that makes an instance what it is differs; its load may change."""
    return (old.boot_id, old.role, old.url, old.control, old.fingerprint) != (
        new.boot_id,
        new.role,
        new.url,
        new.control,
        new.fingerprint,
    )
