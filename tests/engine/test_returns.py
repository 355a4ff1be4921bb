"""Promise 4: blocks held for a peer come back, whatever the client does."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from cluster.launcher import Cluster
from tests.engine.client import ask, metric
from tests.engine.clusters import CHUNKED, as_fields, options
from tests.engine.prompts import token_prompt
from tests.poll import until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

NUM_REQUESTS = 200
LEASE_S = 60.0


def free_blocks(cluster: Cluster) -> dict[str, int]:
    listing = requests.get(f"{cluster.url}/instances", timeout=10).json()
    entries = listing["instances"] if isinstance(listing, dict) else listing
    return {entry["name"]: entry["free_blocks"] for entry in entries}


def ask_and_leave(url: str, body: dict[str, Any], patience_s: float) -> None:
    """A client that closes its connection after a while."""
    try:
        requests.post(f"{url}/v1/completions", json={"model": "baton-demo", **body}, timeout=patience_s)
    except requests.RequestException:
        return


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_all_blocks_come_back_after_cancellations(shared_cluster: Any, transport: str) -> None:
    cluster: Cluster = shared_cluster("1P1D", *CHUNKED, transport=transport)
    ask(cluster.url, {"prompt": token_prompt(300, 50_000), "max_tokens": 2})
    start = until(lambda: _settled(cluster), 30, "both engines to be idle")
    open_before = held_by(cluster)
    dice = random.Random(1)

    def one(index: int) -> None:
        body = {"prompt": token_prompt(dice.randrange(100, 900), 51_000 + index), "max_tokens": 6}
        if index % 3 == 0:
            ask_and_leave(cluster.url, body, dice.uniform(0.01, 1.5))
        else:
            ask(cluster.url, body)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(one, range(NUM_REQUESTS)))
    until(lambda: free_blocks(cluster) == start, LEASE_S, f"free blocks to be {start} again")
    assert metric(cluster.url, "baton_requests_total") >= NUM_REQUESTS
    until(lambda: no_more(held_by(cluster), open_before), 30, f"descriptors and threads to be {open_before} again")
    ask(cluster.url, {"prompt": token_prompt(600, 52_000), "max_tokens": 2})


def held_by(cluster: Cluster) -> dict[int, tuple[int, int]]:
    """(open descriptors, threads) of every engine core and worker, by process."""
    pids = [pid for member in cluster.instances for pid in member.pids() if pid != member.pid]
    return {pid: (len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))) for pid in pids}


def no_more(now: dict[int, tuple[int, int]], before: dict[int, tuple[int, int]]) -> bool:
    return all(now[pid][0] <= before[pid][0] + 2 and now[pid][1] <= before[pid][1] + 2 for pid in before)


def test_nothing_of_a_killed_instance_is_left(make_cluster: Any) -> None:
    """kill -9 of a whole instance with a hand-off behind it: no shared memory, socket or run folder stays."""
    before = sorted(os.listdir("/dev/shm"))
    cluster: Cluster = make_cluster("1P1D", **as_fields(options(*CHUNKED, transport="shm")))
    ask(cluster.url, {"prompt": token_prompt(600, 54_000), "max_tokens": 2})
    ours = sockets_of({pid for member in cluster.instances for pid in member.pids()})
    assert len(ours) == 4, "each worker listens on one socket for its peers and on one for its scheduler"
    folder = cluster.instance("decode-0").log.parent
    cluster.instance("decode-0").kill_group()
    cluster.stop()
    assert not ours & set(sockets().values())
    assert sorted(os.listdir("/dev/shm")) == before
    assert not folder.exists()


def sockets() -> dict[str, str]:
    """Baton's abstract sockets on this machine, by inode."""
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines() if "@baton-" in line]
    return {row[6]: row[7] for row in rows}


def sockets_of(pids: set[int]) -> set[str]:
    """Names of those that these processes hold open."""
    held = {_target(link) for pid in pids for link in Path(f"/proc/{pid}/fd").iterdir()}
    return {name for inode, name in sockets().items() if f"socket:[{inode}]" in held}


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:  # closed in between
        return ""


def _settled(cluster: Cluster) -> dict[str, int] | None:
    """Free blocks when two heartbeats in a row agree that all but vLLM's null block are free."""
    listing = requests.get(f"{cluster.url}/instances", timeout=10).json()
    entries = listing["instances"] if isinstance(listing, dict) else listing
    if all(entry["free_blocks"] == entry["num_blocks"] - 1 for entry in entries):
        return {entry["name"]: entry["free_blocks"] for entry in entries}
    return None


def test_fifty_bodies_that_only_decode_rejects_leave_nothing(shared_cluster: Any) -> None:
    """P takes each of them, D answers 400: P's leg is cancelled and holds no block."""
    cluster: Cluster = shared_cluster("1P1D", *CHUNKED, transport="shm")
    start = until(lambda: _settled(cluster), 30, "both engines to be idle")
    for index in range(50):
        body: dict[str, Any] = {
            "model": "baton-demo",
            "prompt": token_prompt(400, 53_000 + index),
            "max_tokens": 5,
            "min_tokens": 9,
        }
        response = requests.post(f"{cluster.url}/v1/completions", json=body, timeout=60)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["message"]
    until(lambda: free_blocks(cluster) == start, 5, "both pools to be full again")
