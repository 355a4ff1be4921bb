"""Who serves a request: filter, score, pick, and the bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from core.clock import ManualClock
from core.errors import Overloaded, ProtocolError
from core.handoff import Role
from core.topology import Heartbeat, InstanceInfo
from proxy.admission import Admission
from proxy.errors import NoInstance
from proxy.registry import Registry, State
from proxy.router import Router, Want
from proxy.settings import Settings

P, D = Role.PREFILL, Role.DECODE
LOST_S, GONE_S = Settings().lost_after_s, Settings().gone_after_s


class House:
    """Registry, router and admission without a network: every probe finds the instance healthy."""

    def __init__(self, settings: Settings) -> None:
        self.clock = ManualClock()
        self.registry = Registry(settings, self.clock, self._healthy)
        self.router = Router(self.registry, settings)
        self.admission = Admission(self.router, settings)
        self.registry.on_change = self.admission.pump

    async def _healthy(self, _url: str) -> bool:
        return True

    async def join(self, name: str, role: Role, fingerprint: str = "f", control: str = "c", boot: str = "b") -> None:
        info = InstanceInfo(name, role, "http://x", boot, control, fingerprint)
        self.registry.heartbeat(Heartbeat(info))
        await settle()

    def route(self, want: Want = Want.HANDOFF, why: str = "") -> tuple[str | None, str, str]:
        route = self.router.route(want, why)
        assert route is not None
        return route.prefill.name if route.prefill else None, route.server.name, route.why

    def state(self, name: str) -> State:
        return next(i.state for i in self.registry.all() if i.name == name)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def with_house(test: Callable[[House], Coroutine[Any, Any, None]], settings: Settings | None = None) -> None:
    asyncio.run(test(House(settings or Settings())))


def test_the_table_of_routes() -> None:
    async def check(house: House) -> None:
        with pytest.raises(NoInstance):
            house.router.route(Want.HANDOFF)
        await house.join("d", D)
        assert house.route() == (None, "d", "no_prefill")
        assert house.route(Want.ONE_TOKEN) == (None, "d", "no_prefill")
        assert house.route(Want.ALONE, "echo") == (None, "d", "echo")
        await house.join("p", P, fingerprint="other")
        assert house.route() == (None, "d", "no_matching_prefill")
        await house.join("p", P, control="")
        assert house.route() == (None, "d", "no_matching_prefill")
        await house.join("p", P)
        assert house.route() == ("p", "d", "")
        assert house.route(Want.ONE_TOKEN) == (None, "p", "one_token")
        house.registry.mark_lost(next(i for i in house.registry.all() if i.name == "d"))
        assert house.route() == (None, "p", "no_decode")
        assert house.route(Want.ALONE, "echo") == (None, "p", "no_decode")

    with_house(check)


def test_pairs_have_the_same_fingerprint() -> None:
    async def check(house: House) -> None:
        for name, role, fingerprint in [("p1", P, "1"), ("p2", P, "2"), ("d1", D, "1"), ("d2", D, "2")]:
            await house.join(name, role, fingerprint)
        pairs = {house.route()[:2] for _ in range(8)}
        assert pairs == {("p1", "d1"), ("p2", "d2")}

    with_house(check)


def test_the_least_loaded_is_picked_and_equals_take_turns() -> None:
    async def check(house: House) -> None:
        for name in ("p1", "p2"):
            await house.join(name, P)
        for name in ("d1", "d2"):
            await house.join(name, D)
        leases = [await house.admission.admit(Want.HANDOFF) for _ in range(8)]
        assert {i.name: i.outstanding for i in house.registry.all()} == dict.fromkeys(("p1", "p2", "d1", "d2"), 4)
        for lease in leases:
            if lease.route.server.name == "d1":
                lease.release()
        assert house.route(Want.ALONE, "echo")[1] == "d1"

    with_house(check)


def test_a_suspect_is_avoided_for_a_while_but_used_if_it_is_the_last() -> None:
    async def check(house: House) -> None:
        await house.join("d1", D)
        await house.join("d2", D)
        first = house.registry.all()[0]
        house.registry.mark_suspect(first)
        assert {house.route(Want.ALONE)[1] for _ in range(4)} == {"d2"}
        house.registry.mark_lost(house.registry.all()[1])
        assert house.route(Want.ALONE)[1] == "d1"
        house.clock.advance(Settings().suspect_s)
        assert not house.registry.is_suspect(first)

    with_house(check)


def test_an_instance_is_lost_in_silence_and_comes_back_through_starting() -> None:
    async def check(house: House) -> None:
        await house.join("d", D)
        house.clock.advance(LOST_S + 0.1)
        house.registry.check_silence()
        assert house.state("d") is State.LOST
        info = house.registry.all()[0].info
        house.registry.heartbeat(Heartbeat(info))
        assert house.state("d") is State.STARTING
        await settle()
        assert house.state("d") is State.READY
        house.registry.heartbeat(Heartbeat(info, leaving=True))
        assert house.state("d") is State.LEAVING
        with pytest.raises(NoInstance):
            house.router.route(Want.ALONE)
        house.clock.advance(100)
        house.registry.check_silence()
        assert house.registry.all() == []

    with_house(check)


class Leg:
    def __init__(self) -> None:
        self.whys: list[str] = []

    def abort(self, why: str) -> None:
        self.whys.append(why)


def test_what_hangs_on_the_silent_or_the_replaced_is_given_up() -> None:
    async def check(house: House) -> None:
        leg = Leg()
        await house.join("d", D)
        house.registry.all()[0].legs.add(leg)
        house.clock.advance(GONE_S - 1)
        house.registry.check_silence()
        assert leg.whys == []
        house.clock.advance(2)
        house.registry.check_silence()
        assert leg.whys == [f"silent for {GONE_S + 1:.0f} s"]
        await house.join("d", D, boot="another")
        assert leg.whys[1:] == ["replaced by a newer start"]
        assert house.state("d") is State.READY

    with_house(check)


def test_what_cannot_be_an_instance_is_refused() -> None:
    async def check(house: House) -> None:
        for name, url, boot in [("", "http://x", "b"), ("d", "file:///etc", "b"), ("d", "http://x", "")]:
            with pytest.raises(ProtocolError):
                house.registry.heartbeat(Heartbeat(InstanceInfo(name, D, url, boot)))

    with_house(check)


def test_a_window_bounds_hand_offs_per_prefill_and_others_pass_by() -> None:
    async def check(house: House) -> None:
        await house.join("p", P)
        await house.join("d", D)
        first, second = [await house.admission.admit(Want.HANDOFF) for _ in range(2)]
        waiting = [asyncio.create_task(house.admission.admit(Want.HANDOFF)) for _ in range(2)]
        await settle()
        assert house.admission.queue_length == 2
        alone = await house.admission.admit(Want.ALONE, "echo")
        assert alone.route.why == "echo"
        second.release_prefill()
        second.release_prefill()
        await settle()
        assert [task.done() for task in waiting] == [True, False], "first come, first served, one place for one"
        first.release()
        assert (await waiting[1]).route.prefill is not None

    with_house(check, Settings(window=2))


def test_the_queue_is_bounded_and_the_wait_too() -> None:
    async def check(house: House) -> None:
        await house.join("d", D)
        await house.admission.admit(Want.ALONE)
        waiting = asyncio.create_task(house.admission.admit(Want.ALONE))
        await settle()
        with pytest.raises(Overloaded, match="are waiting already"):
            await house.admission.admit(Want.ALONE)
        with pytest.raises(Overloaded, match="waited"):
            await waiting
        assert house.admission.queue_length == 0

    with_house(check, Settings(in_flight_limit=1, queue_limit=1, queue_timeout_s=0.01))


def test_who_leaves_the_queue_takes_no_place_along() -> None:
    async def check(house: House) -> None:
        await house.join("d", D)
        lease = await house.admission.admit(Want.ALONE)
        leaver, stayer = [asyncio.create_task(house.admission.admit(Want.ALONE)) for _ in range(2)]
        await settle()
        lease.release()  # grants the leaver its place in the same step in which it leaves
        leaver.cancel()
        await asyncio.wait({leaver})
        assert leaver.cancelled()
        (await stayer).release()
        assert house.registry.all()[0].serving == 0

    with_house(check, Settings(in_flight_limit=1))


def test_those_who_wait_for_a_prefill_that_is_lost_go_on_without_it() -> None:
    async def check(house: House) -> None:
        await house.join("p", P)
        await house.join("d", D)
        await house.admission.admit(Want.HANDOFF)
        waiting = asyncio.create_task(house.admission.admit(Want.HANDOFF))
        await settle()
        house.clock.advance(LOST_S + 1)
        await house.join("d", D)
        house.registry.check_silence()
        assert (await waiting).route.why == "no_prefill"
        house.clock.advance(LOST_S + 1)
        house.registry.check_silence()
        with pytest.raises(NoInstance):
            await house.admission.admit(Want.HANDOFF)

    with_house(check, Settings(window=1))
