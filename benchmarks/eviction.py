"""`python -m benchmarks.eviction TRACE`: the hit rate of each eviction policy on a trace of block hashes.

    for each request of the trace:  look its prefix up ──▶ found blocks are used ──▶ the others are stored, evicting

TRACE has one JSON object per line with `hash_ids`: equal ids are blocks of equal prefixes (the traces of kvcache-ai's
Mooncake). A hit counts only if every block before it is a hit. Nothing is measured but which blocks are there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from core.errors import ConfigError
from kvcache.keys import KEY_BYTES
from kvcache.policy import POLICIES, make_policy

SHARES = (0.002, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Of all blocks of the trace: how large the arena is."""


class Request(msgspec.Struct, frozen=True):
    """One line of a trace; what else it says does not matter here."""

    hash_ids: list[int]


def run(argv: Sequence[str]) -> int:
    """Prints a Markdown table. Raises ConfigError for a file that is no such trace."""
    parser = argparse.ArgumentParser("python -m benchmarks.eviction", description=__doc__)
    parser.add_argument("trace", type=Path)
    options = parser.parse_args(argv)
    requests = read_trace(options.trace)
    all_blocks = len({block for request in requests for block in request})
    print(f"{len(requests):,} requests, {sum(map(len, requests)):,} blocks, {all_blocks:,} of them different\n")
    print("| arena, blocks | of all | " + " | ".join(POLICIES) + " |")
    print("|---|---|" + "---|" * len(POLICIES))
    for share in SHARES:
        capacity = int(all_blocks * share)
        rates = [f"{hit_rate(requests, policy, capacity):.1%}" for policy in POLICIES]
        print(f"| {capacity:,} | {share:.1%} | " + " | ".join(rates) + " |", flush=True)
    return 0


def read_trace(path: Path) -> list[list[bytes]]:
    """The keys of each request's blocks, in order. Raises ConfigError."""
    decoder = msgspec.json.Decoder(Request)
    try:
        lines = path.read_bytes().splitlines()
        return [[block.to_bytes(KEY_BYTES, "big") for block in decoder.decode(line).hash_ids] for line in lines]
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path} is not a trace of block hashes: {error}") from error


def hit_rate(requests: Sequence[Sequence[bytes]], name: str, capacity: int) -> float:
    """The share of all blocks that were found, in an arena of `capacity` blocks under the policy of this name."""
    policy, there = make_policy(name), set[bytes]()
    num_found = 0
    for keys in requests:
        num_prefix = next((index for index, key in enumerate(keys) if key not in there), len(keys))
        num_found += num_prefix
        policy.used(keys[:num_prefix])
        busy = set(keys)
        for key in keys[num_prefix:]:
            if key in there:
                continue
            if len(there) >= capacity:
                victim = policy.victim(lambda key, busy=busy: key not in busy)  # type: ignore[misc]
                if victim is None:
                    break
                there.remove(victim)
            there.add(key)
            policy.admitted(key)
        policy.touched(keys)
    return num_found / max(sum(map(len, requests)), 1)


if __name__ == "__main__":
    try:
        sys.exit(run(sys.argv[1:]))
    except ConfigError as error:
        sys.exit(f"baton: {error}")
