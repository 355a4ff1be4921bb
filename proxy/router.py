"""Filter, score, pick: which instances serve a request.

    want       ready P and D             no P, or none that fits     no D              nobody
    HANDOFF    the best pair             D alone (no_prefill)        P alone           NoInstance
    ONE_TOKEN  P alone (one_token)       D alone                     P alone           NoInstance
    ALONE      D alone, with its reason  the same                    P alone           NoInstance

A pair fits if both have a control address and the same fingerprint. The score is the proxy's own count of what it has
given each instance (what instances report is a second old under load); among equals the one picked longest ago.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence

import msgspec

from core.handoff import Role
from proxy.errors import NoInstance
from proxy.registry import Instance, Registry
from proxy.settings import Settings


class Want(enum.Enum):
    """What a request asks of the router."""

    HANDOFF = "handoff"
    ONE_TOKEN = "one_token"
    ALONE = "alone"


class Route(msgspec.Struct, frozen=True):
    """server answers the client; prefill computes the prompt for it; why: the reason if there is no hand-off."""

    server: Instance
    prefill: Instance | None = None
    why: str = ""


class Router:
    """Stateless but for the order in which instances were picked last."""

    def __init__(self, registry: Registry, settings: Settings) -> None:
        self._registry = registry
        self._settings = settings
        self._num_picks = 0

    def route(self, want: Want, why: str = "") -> Route | None:
        """A route, or None while every instance that would do is full. Raises NoInstance if there is none at all."""
        prefills, decodes = self._registry.ready(Role.PREFILL), self._registry.ready(Role.DECODE)
        if want is Want.ONE_TOKEN and prefills:
            return self._alone(prefills, "one_token")
        if not decodes:
            if not prefills:
                raise NoInstance("no instance is ready to serve")
            return self._alone(prefills, "no_decode")
        if want is not Want.HANDOFF:
            return self._alone(decodes, why or "no_prefill")
        pairs = [(p, d) for p in prefills for d in decodes if _fit(p, d)]
        if not pairs:
            return self._alone(decodes, "no_matching_prefill" if prefills else "no_prefill")
        return self._pair(pairs)

    def another(self, tried: set[str]) -> Instance | None:
        """Who else could answer a request that those named could not: a decode instance first, then a prefill one."""
        for role in (Role.DECODE, Role.PREFILL):
            others = [i for i in self._with_room(self._registry.ready(role)) if i.name not in tried]
            if others:
                return self._pick(min(others, key=self._score))
        return None

    def _alone(self, instances: Sequence[Instance], why: str) -> Route | None:
        free = self._with_room(instances)
        return Route(self._pick(min(free, key=self._score)), None, why) if free else None

    def _pair(self, pairs: Iterable[tuple[Instance, Instance]]) -> Route | None:
        window, limit = self._settings.window, self._settings.in_flight_limit
        free = [(p, d) for p, d in pairs if p.handoffs < window and d.serving < limit]
        if not free:
            return None
        prefill, decode = min(free, key=lambda pair: (*self._score(pair[0]), *self._score(pair[1])))
        return Route(self._pick(decode), self._pick(prefill))

    def _with_room(self, instances: Sequence[Instance]) -> list[Instance]:
        return [i for i in instances if i.serving < self._settings.in_flight_limit]

    def _score(self, instance: Instance) -> tuple[bool, int, int]:
        return self._registry.is_suspect(instance), instance.outstanding, instance.picked

    def _pick(self, instance: Instance) -> Instance:
        self._num_picks += 1
        instance.picked = self._num_picks
        return instance


def _fit(prefill: Instance, decode: Instance) -> bool:
    ours, theirs = prefill.info, decode.info
    return bool(ours.control and theirs.control) and ours.fingerprint == theirs.fingerprint
