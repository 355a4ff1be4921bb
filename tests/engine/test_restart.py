"""A decode instance that restarts: its old memory is let go by the prefill instance at once, and hand-offs go on."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.launcher import Cluster
from cluster.members import InstanceMember
from tests.engine.client import ask, record
from tests.engine.prompts import token_prompt
from tests.poll import until

pytestmark = [pytest.mark.engine, pytest.mark.host_memory, pytest.mark.timeout(300)]


def test_the_old_memory_is_gone_from_the_prefill_instance_and_the_next_hand_off_works(
    start: Callable[..., Cluster], plain: Cluster
) -> None:
    cluster = start("1P1D", transport="shm")
    first, second = ({"prompt": token_prompt(400, seed), "max_tokens": 6} for seed in (71_000, 72_000))
    assert ask(cluster.url, first).outcome() == ask(plain.url, first).outcome()
    prefill, decode = cluster.instance("prefill-0"), cluster.instance("decode-0")
    own, old = _memories(prefill), _memories(decode)
    assert old < own, "the prefill instance has the decode instance's memory mapped beside its own"
    decode.kill_group()
    until(lambda: not _memories(prefill) & old, 5.0, "the mapping is gone, although nobody asks anything")
    decode.after_death()
    decode.start()
    cluster.wait_ready(120)
    answer = ask(cluster.url, second)
    entry = record(cluster.url, answer)
    assert (entry["outcome"], entry["path"]["transport"]) == ("landed", "shm"), entry
    assert answer.outcome() == ask(plain.url, second).outcome()
    assert _memories(prefill) == (own - old) | _memories(decode)


def _memories(member: InstanceMember) -> set[str]:
    """Inodes of the KV caches that its processes have mapped."""
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in member.pids())
    return set(re.findall(r"(\d+) +/memfd:baton-kv", maps))
