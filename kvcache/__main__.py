"""`python -m kvcache`: the cache server as a child of whoever holds its memory's descriptors. What it should be stands
in the environment (`spec.SPEC_VARIABLE`), as `--cache` says it."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path

import uvloop

from core.clock import SystemClock
from core.errors import BatonError
from kvcache.server import CacheServer
from kvcache.spec import SPEC_VARIABLE, CacheSpec
from kvcache.tiers import make_tier


def main() -> int:
    """Serves until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser("python -m kvcache")
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--arena-fd", type=int, required=True)
    parser.add_argument("--ledger-fd", type=int, required=True)
    options = parser.parse_args()
    fds = options.arena_fd, options.ledger_fd
    clock = SystemClock()
    try:
        text = os.environ.get(SPEC_VARIABLE)
        spec = CacheSpec.parse(text) if text else CacheSpec()
        tiers = [make_tier(tier, clock) for tier in spec.tiers]
        uvloop.run(_serve(CacheServer(fds, options.socket, clock, tiers, spec.listen)))
    except BatonError as error:
        print(f"baton cache: {error}", file=sys.stderr)
        return 1
    return 0


async def _serve(server: CacheServer) -> None:
    serving = asyncio.ensure_future(server.serve())
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, serving.cancel)
    counts = server.index.counts
    heard = f", listens to peers at {server.peer_server.address}" if server.peer_server else ""
    print(
        f"cache server: {server.index.capacity_bytes} bytes, {counts.taken_over} blocks taken over{heard}", flush=True
    )
    try:
        await serving
    except asyncio.CancelledError:
        return


if __name__ == "__main__":
    sys.exit(main())
