"""Workloads over two hosts: who is asked, what each host is told of the other, and that no answer claims too much."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from benchmarks.backings import OneOfTwo
from benchmarks.cache import run
from benchmarks.cache_findings import findings_of
from benchmarks.cache_results import Answered, CacheRun, WorkloadCell
from benchmarks.cache_summary import workload_rows
from benchmarks.cache_systems import SYSTEMS
from benchmarks.cache_table import problem_lines
from benchmarks.hosts import Hosts
from benchmarks.part_workloads import silent_tier
from benchmarks.workloads import Situation
from cluster.zygote import Zygote
from kvcache.spec import PeersSpec
from tests.benchmarks import cache_runs
from tests.benchmarks.cache_runs import answered, workload_cell

MIB = 1 << 20
SHARED = list(range(1000, 1256))


class Host:
    """Keeps every prompt's whole blocks; a friend's too, if it has one."""

    def __init__(self, friend: Host | None = None) -> None:
        self.friend = friend
        self.asked: list[Sequence[int]] = []
        self.lie: dict[str, int] = {}

    def ask(self, prompt: Sequence[int], max_tokens: int) -> Answered:
        own = self._has(prompt)
        from_friend = max(self.friend._has(prompt) - own, 0) if self.friend else 0
        self.asked.append(prompt)
        tiers = self.lie or {"host": own, "peer": from_friend}
        return answered(10.0, len(prompt), from_outside=sum(tiers.values()), tiers=tiers)

    def _has(self, prompt: Sequence[int]) -> int:
        lengths = range(128, len(prompt), 128)
        return max((n for n in lengths for each in self.asked if each[:n] == prompt[:n]), default=0)


def two() -> tuple[Host, Host]:
    one = Host()
    other = Host(one)
    one.friend = other
    return one, other


def test_requests_go_to_the_hosts_by_turns_and_half_of_the_first_reuse_is_the_peers() -> None:
    one, other = two()
    hosts = Hosts((one, other))
    answers = [hosts.ask(index, [*SHARED, index], 4) for index in range(5)]
    assert [len(host.asked) for host in (one, other)] == [3, 2]
    assert [answer.tiers["peer"] for answer in answers] == [0, 256, 0, 0, 0]
    assert [answer.tiers["host"] for answer in answers] == [0, 0, 256, 256, 256]
    assert not any(answer.problem for answer in answers)


def test_a_host_alone_is_asked_everything() -> None:
    host = Host()
    hosts = Hosts((host,))
    for index in range(3):
        assert not hosts.ask(index, [*SHARED, index], 4).problem
    assert len(host.asked) == 3


@pytest.mark.parametrize(
    ("lie", "says"),
    [
        ({"host": 256}, "256 tokens from this host, which was asked for 0 of them"),
        ({"peer": 384}, "384 tokens from the peer, which was asked for 256 of them"),
    ],
)
def test_what_a_host_was_never_asked_for_cannot_come_from_it(lie: dict[str, int], says: str) -> None:
    one, other = two()
    hosts = Hosts((one, other))
    hosts.ask(0, [*SHARED, *range(200)], 4)
    other.lie = lie
    answer = hosts.ask(1, [*SHARED, *range(300, 500)], 4)
    assert answer.problem == says


def test_an_incomplete_block_may_be_found_too() -> None:
    one, other = two()
    hosts = Hosts((one, other))
    hosts.ask(0, [*SHARED, 1, 2, 3], 4)
    other.lie = {"peer": len(SHARED) + 3}
    assert not hosts.ask(1, [*SHARED, 1, 2, 3, 4], 4).problem


def test_each_host_listens_where_the_other_one_asks() -> None:
    places = "127.0.0.1:7600", "127.0.0.2:7600"
    one, other = (OneOfTwo(64 * MIB, here, there).cache() for here, there in (places, places[::-1]))
    assert one is not None
    assert other is not None
    assert (one.listen, other.listen) == places
    assert one.tiers == (PeersSpec((other.listen,)),)
    assert other.tiers == (PeersSpec((one.listen,)),)
    assert one.num_bytes == other.num_bytes == 64 * MIB


def test_a_tier_that_gave_nothing_spoils_the_cell_that_is_named_after_it() -> None:
    large = Situation("rag", 80, "large", 7, 10)
    silent = [answered(10.0, from_outside=256, tiers={"host": 256})]
    problem = silent_tier(SYSTEMS["peer"], large, silent)
    assert problem == "not one token from peer"
    assert not silent_tier(SYSTEMS["host"], large, silent)
    assert not silent_tier(SYSTEMS["lmcache"], large, [answered(10.0)]), "it does not tell"
    assert not silent_tier(SYSTEMS["peer"], msgspec.structs.replace(large, size="none"), [answered(10.0)])
    bad = cache_runs.run(msgspec.structs.replace(workload_cell("peer", 100.0), problem=problem))
    assert problem_lines(bad) == ["NOT VALID: workload/peer/rag/90/large: not one token from peer (1 of 100)"]
    assert findings_of(bad)[0].met is False


@pytest.mark.engine
@pytest.mark.full
@pytest.mark.timeout(600)
def test_two_real_hosts_take_from_each_other_what_they_were_not_asked_for(
    zygote: Zygote | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if zygote is None:
        pytest.skip("measures CPU instances")
    out = tmp_path / "x.json"
    asked = ["--parts", "workloads", "--systems", "peer", "--workloads", "rag", "--reuse", "50", "--sizes", "large"]
    assert run([*asked, "--requests", "8", "--out", str(out)], zygote) == 0, capsys.readouterr().out
    measured = msgspec.json.decode(out.read_bytes(), type=CacheRun)
    (row,) = workload_rows(measured)
    assert row.hits["peer"] > 0
    assert row.saved > row.possible / 2
    (cell,) = [cell for cell in measured.cells if isinstance(cell, WorkloadCell)]
    assert any(set(answer.tiers) == {"peer"} for answer in cell.answers)
