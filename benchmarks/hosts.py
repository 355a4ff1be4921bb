"""The hosts of a system under workloads, asked by turns: one, or for `peer` two with Baton on each.

                    ┌─ 0, 2, 4 ... ─▶ proxy ── engine ── cache server, 127.0.0.1
    client, request ┤                                        ║ TCP, both ways
                    └─ 1, 3, 5 ... ─▶ proxy ── engine ── cache server, 127.0.0.2

So a good half of what is reused was last asked of the other host. Both engines compute on the same core, as all
engines here do: one client asks one thing at a time, so only one computes.

Memory model: each of the two has what the one host of `disk` and `redis` has: an engine's cache, and an arena that
holds less than the larger working sets. With more, a host would have a copy of its own after one visit, and half as
much or less would come from the peer. The tier below an arena is the other arena and nothing else, and a block that
both hosts have used takes room in both: `peer` has twice the memory of `disk` and `redis` but no place beside it, and
far less than `host`.
Threads: the caller's; what runs on hosts are processes of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

import msgspec

from benchmarks.asking import Asker
from benchmarks.backings import OneOfTwo, two_free_ports
from benchmarks.bench import BLOCK_TOKENS, Bench
from benchmarks.cache_results import Answered
from benchmarks.cache_systems import CacheSystem, Memory
from benchmarks.contestant import contestant
from cluster.ports import LOOPBACK

PEER = "peer"
ADDRESSES = (LOOPBACK, "127.0.0.2")
"""Every address of 127.0.0.0/8 is this machine; two of them never compete for a port."""
WARM_UP_TOKENS = 4 * BLOCK_TOKENS
WARM_UP_MAX_TOKENS = 4


class Client(Protocol):
    """Of one host."""

    def ask(self, prompt: Sequence[int], max_tokens: int) -> Answered: ...


class Hosts:
    """Asks them by turns, and checks that each can have had what it says it found."""

    def __init__(self, clients: Sequence[Client]) -> None:
        self._clients = clients
        self._asked: list[list[Sequence[int]]] = [[] for _ in clients]

    def ask(self, index: int, prompt: Sequence[int], max_tokens: int) -> Answered:
        """index: of the request; it decides which host is asked. Raises BatonError."""
        here = index % len(self._clients)
        elsewhere = [each for host, asked in enumerate(self._asked) if host != here for each in asked]
        answer = self._clients[here].ask(prompt, max_tokens)
        problem = _claim(answer, _had(self._asked[here], prompt), _had(elsewhere, prompt))
        self._asked[here].append(prompt)
        return msgspec.structs.replace(answer, problem=answer.problem or problem)


@contextmanager
def hosts_of(bench: Bench, system: CacheSystem, memory: Memory) -> Iterator[Hosts]:
    """Started and warm, engines with their own prefix cache; stopped at the end. Raises BatonError."""
    if system.tier == PEER:
        with _two(bench, system, memory) as hosts:
            yield hosts
        return
    with bench.running(system, memory, prefix_caching=True) as (_, asker):
        asker.ask(bench.random_prompt(WARM_UP_TOKENS, "workloads/warm-up"), WARM_UP_MAX_TOKENS)
        yield Hosts((asker,))


@contextmanager
def _two(bench: Bench, system: CacheSystem, memory: Memory) -> Iterator[Hosts]:
    """They know of each other's blocks when they are first asked."""
    here, there = (f"{address}:{two_free_ports(address)}" for address in ADDRESSES)
    backings = OneOfTwo(memory.host_bytes, here, there), OneOfTwo(memory.host_bytes, there, here)
    with ExitStack() as stack:
        running = []
        for number, backing in enumerate(backings, 1):
            bench.bar.show(f"starting {system.name}, host {number} of 2")
            running.append(
                stack.enter_context(contestant(system, bench.site, memory, prefix_caching=True, backing=backing))
            )
        clients = [Asker(each, bench.clock) for each in running]
        for number, client in enumerate(clients, 1):
            prompt = bench.random_prompt(WARM_UP_TOKENS, f"workloads/warm-up/{number}")
            client.ask(prompt, WARM_UP_MAX_TOKENS)
        for each in running:
            each.settle()
        yield Hosts(clients)


def _claim(answer: Answered, had_here: int, had_elsewhere: int) -> str:
    """Why an answer cannot have come from where it says; empty if it can."""
    from_peer = answer.tiers.get(PEER, 0)
    own = answer.from_engine + answer.from_outside - from_peer
    if from_peer > had_elsewhere:
        return f"{from_peer} tokens from the peer, which was asked for {had_elsewhere} of them"
    if own > had_here:
        return f"{own} tokens from this host, which was asked for {had_here} of them"
    return ""


def _had(asked: Sequence[Sequence[int]], prompt: Sequence[int]) -> int:
    """How much of a prompt earlier ones began with, up to the end of a block: Baton keeps incomplete ones too."""
    most = max((_common(each, prompt) for each in asked), default=0)
    return -(-most // BLOCK_TOKENS) * BLOCK_TOKENS


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))
