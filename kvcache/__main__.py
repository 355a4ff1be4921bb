"""`python -m kvcache`: the cache server as a child of whoever holds its memory's descriptors."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from pathlib import Path

import uvloop

from core.clock import SystemClock
from core.errors import BatonError
from kvcache.disk import DiskTier
from kvcache.server import CacheServer
from kvcache.tier import Tier


def main() -> int:
    """Serves until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser("python -m kvcache")
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--arena-fd", type=int, required=True)
    parser.add_argument("--ledger-fd", type=int, required=True)
    parser.add_argument("--disk", type=Path, metavar="FOLDER", help="a tier on this disk")
    parser.add_argument("--disk-bytes", type=int, default=0, help="how much of it")
    parser.add_argument("--redis", action="append", default=[], metavar="URL", help="a tier on these servers")
    options = parser.parse_args()
    fds = options.arena_fd, options.ledger_fd
    try:
        uvloop.run(_serve(CacheServer(fds, options.socket, SystemClock(), _tiers(options))))
    except BatonError as error:
        print(f"baton cache: {error}", file=sys.stderr)
        return 1
    return 0


def _tiers(options: argparse.Namespace) -> list[Tier]:
    """The nearest first. Raises ConfigError."""
    tiers: list[Tier] = []
    if options.disk is not None:
        tiers.append(DiskTier(options.disk, options.disk_bytes, SystemClock()))
    if options.redis:
        from kvcache.redis_tier import RedisTier

        tiers.append(RedisTier(options.redis))
    return tiers


async def _serve(server: CacheServer) -> None:
    serving = asyncio.ensure_future(server.serve())
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, serving.cancel)
    counts = server.index.counts
    print(f"cache server: {server.index.capacity_bytes} bytes, {counts.taken_over} blocks taken over", flush=True)
    try:
        await serving
    except asyncio.CancelledError:
        return


if __name__ == "__main__":
    sys.exit(main())
