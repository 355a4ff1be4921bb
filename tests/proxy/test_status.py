"""`/status` and the metrics say by which path each pair goes; a heartbeat's answer says who may send."""

from __future__ import annotations

import msgspec
import pytest

from core.handoff import Role
from core.path import Path, PathState
from core.topology import Heartbeat, InstanceInfo, Welcome
from tests.fakes.engine import FakeEngine
from tests.proxy.fleet import Fleet, engines


def info_with(engine: FakeEngine, *paths: Path) -> InstanceInfo:
    return msgspec.structs.replace(engine.info(), paths=list(paths))


def welcome(fleet: Fleet, info: InstanceInfo) -> Welcome:
    answer = fleet.client.post("/instances", content=msgspec.json.encode(Heartbeat(info)))
    return msgspec.json.decode(answer.content, type=Welcome)


def path_to(engine: FakeEngine, transport: str, state: PathState, num_failures: int = 0) -> Path:
    boot_id = engine.info().boot_id
    return Path(engine.name, boot_id, transport, state, 6.04321, 5.5, 41.23, num_failures, f"why of {transport}")


def test_a_pairs_paths_are_shown_with_figures_and_reasons(fleet: Fleet) -> None:
    with engines(Role.PREFILL, Role.DECODE) as (prefill, decode):
        fleet.join(prefill, decode)
        assert fleet.client.get("/status").json()["pairs"] == []
        paths = (
            path_to(decode, "shm", PathState.FAILED, 2),
            path_to(decode, "zmq", PathState.CHOSEN),
            Path("decode-9", "of another life", "zmq", PathState.CHOSEN),
        )
        welcome(fleet, info_with(prefill, *paths))
        status = fleet.client.get("/status").json()
        assert [(each["name"], each["role"], each["state"]) for each in status["instances"]] == [
            ("prefill-0", "prefill", "ready"),
            ("decode-1", "decode", "ready"),
        ]
        (pair,) = status["pairs"]
        assert (pair["prefill"], pair["decode"], pair["transport"]) == ("prefill-0", "decode-1", "zmq")
        assert pair["why"] == "why of zmq"
        assert pair["paths"][0] == {
            "transport": "shm",
            "state": "failed",
            "write_gb_per_s": 6.043,
            "read_gb_per_s": 5.5,
            "latency_us": 41.2,
            "failures": 2,
            "why": "why of shm",
        }
        labels = 'decode="decode-1",prefill="prefill-0",ranks="0-0",transport="zmq"'
        assert fleet.metric(f"baton_path_chosen{{{labels}}}") == 1
        assert fleet.metric(f"baton_path_failures{{{labels.replace('zmq', 'shm')}}}") == 2
        speed = labels.replace(",prefill", ',direction="write",prefill')
        assert fleet.metric(f"baton_path_gb_per_s{{{speed}}}") == pytest.approx(6.04321)
        assert "another life" not in fleet.client.get("/metrics").text
        assert "decode-9" not in fleet.client.get("/metrics").text


def test_each_pair_of_ranks_has_paths_of_its_own(fleet: Fleet) -> None:
    with engines(Role.PREFILL, Role.DECODE) as (prefill, decode):
        fleet.join(prefill, decode)
        first = path_to(decode, "shm", PathState.CHOSEN)
        second = msgspec.structs.replace(first, sender_rank=1)
        other = msgspec.structs.replace(second, transport="zmq", state=PathState.STANDBY)
        welcome(fleet, info_with(prefill, first, second, other))
        pairs = fleet.client.get("/status").json()["pairs"]
        assert [(pair["ranks"], pair["transport"], len(pair["paths"])) for pair in pairs] == [
            ([0, 0], "shm", 1),
            ([1, 0], "shm", 2),
        ]
        labels = 'decode="decode-1",prefill="prefill-0",ranks="1-0",transport="zmq"'
        assert fleet.metric(f"baton_path_chosen{{{labels}}}") == 0


def test_a_decode_instance_is_told_who_may_send_to_it(fleet: Fleet) -> None:
    with engines(Role.PREFILL, Role.PREFILL, Role.DECODE) as (prefill, other, decode):
        fleet.join(prefill, decode)
        welcome(fleet, msgspec.structs.replace(other.info(), fingerprint="of another model"))
        peers = welcome(fleet, decode.info()).peers
        assert [(peer.name, peer.boot_id) for peer in peers] == [("prefill-0", prefill.info().boot_id)]
        assert peers[0].control == prefill.info().control
        assert welcome(fleet, prefill.info()).peers == [], "a prefill instance is greeted, and greets nobody"
        fleet.beat(prefill, leaving=True)
        assert welcome(fleet, decode.info()).peers == []
