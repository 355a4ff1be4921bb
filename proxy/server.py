"""The proxy as a process: options, the socket, the line that says it listens, and a clean end on SIGTERM."""

from __future__ import annotations

import argparse
import signal
import socket
import sys
from collections.abc import Sequence

import msgspec
import uvicorn
from fastapi import FastAPI

from core.clock import SystemClock
from core.errors import ConfigError
from proxy.app import make_app
from proxy.settings import Settings

_GRACE_S = 3
_DEFAULTS = Settings()


def parse_options(arguments: Sequence[str] | None = None) -> tuple[str, int, Settings]:
    """Host, port and settings from a command line."""
    parser = argparse.ArgumentParser(prog="python -m proxy", description="Baton's OpenAI endpoint.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 picks a free one")
    parser.add_argument("--queue-limit", type=int, default=_DEFAULTS.queue_limit, help="waiting requests, then 429")
    parser.add_argument("--window", type=int, default=_DEFAULTS.window, help="hand-offs under way per prefill instance")
    parser.add_argument("--in-flight-limit", type=int, default=_DEFAULTS.in_flight_limit, help="requests per instance")
    parser.add_argument("--timeout-s", type=float, default=_DEFAULTS.timeout_s, help="of one hand-off")
    parser.add_argument(
        "--threshold", type=int, default=_DEFAULTS.threshold, help="tokens; shorter prompts go to D alone"
    )
    parser.add_argument(
        "--open-control", action="store_true", help="let other hosts register instances: closed nets only"
    )
    parser.add_argument(
        "--tenant-key",
        default=_DEFAULTS.tenant_key,
        metavar="FILE",
        help="secret that separates API keys' KV caches; made if missing (default: a random one per start)",
    )
    parser.add_argument(
        "--share-between-keys", action="store_true", help="one KV cache for all API keys: only cache_salt separates"
    )
    parser.add_argument("--cache-socket", default="", metavar="PATH", help="of the host's cache server, for contexts")
    parser.add_argument("--contexts-file", default="", metavar="FILE", help="remembers contexts over the proxy's death")
    parser.add_argument("--keys", default="", metavar="FILE", help="instances must have the same (baton keys FILE)")
    options = vars(parser.parse_args(arguments))
    host, port = options.pop("host"), options.pop("port")
    for name in ("queue_limit", "window", "in_flight_limit", "timeout_s"):
        if options[name] <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    return host, port, msgspec.convert(options, Settings)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises ConfigError with one clear line."""
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"cannot listen on {host}:{port}: ports are 0 to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
            sock.listen(2048)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return sock


class _Server(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config, line: str) -> None:
        super().__init__(config)
        self._line = line

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._line, flush=True)


def make_server(app: FastAPI, line: str) -> uvicorn.Server:
    """Without the trust in X-Forwarded-For that is uvicorn's default: it would make any client look local."""
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        ws="none",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=_GRACE_S,
    )
    return _Server(config, line)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or Ctrl-C; the process's exit code."""
    host, port, settings = parse_options(arguments)
    try:
        app = make_app(settings, SystemClock())
        sock = listen(host, port)
    except ConfigError as error:
        print(f"proxy: {error}", file=sys.stderr)
        return 1
    shown = f"[{host}]" if ":" in host else host
    server = make_server(app, f"proxy listening http://{shown}:{sock.getsockname()[1]}")
    # uvicorn stops on these by itself, then raises them once more: that must not look like a death
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    server.run([sock])
    return 0
