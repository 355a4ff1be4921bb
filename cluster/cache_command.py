"""`baton cache serve | stats | drop`: the host's KV cache by hand."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from cluster.cache import CacheMember, figures_of
from cluster.processes import stop_groups
from cluster.progress import Progress
from cluster.runfolder import RunFolder, default_base
from cluster.supervisor import Supervisor
from core.errors import BatonError, ConfigError
from kvcache.client import ask_figures, drop_all
from kvcache.spec import CacheSpec

_POLL_S = 0.1
_START_TIMEOUT_S = 20.0


def default_socket() -> Path:
    """Where `baton cache serve` listens unless told otherwise: one server per user and host."""
    return default_base() / "cache.sock"


def serve(options: argparse.Namespace) -> int:
    """Prints `ready unix:PATH`; stays up until it is stopped. A server that dies is started again on its arena."""
    spec = CacheSpec.parse(options.size)
    if not spec.num_bytes:
        raise ConfigError("baton cache serve needs a size, for example 8GiB")
    folder = RunFolder.create()
    socket = Path(options.socket).absolute() if options.socket else default_socket()
    if figures_of(str(socket)) is not None:
        folder.remove()
        raise ConfigError(f"a cache server listens at {socket} already; give another --socket")
    progress = Progress(sys.stderr)
    member = CacheMember(spec, folder.path, socket)
    supervisor = Supervisor([member], progress.note)
    try:
        member.start()
        _wait_ready(member)
        supervisor.start()
        with suppress(BrokenPipeError):
            print(f"ready unix:{socket}", flush=True)
        while not supervisor.given_up:
            time.sleep(_POLL_S)
        raise BatonError("the cache server cannot be kept up")
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        supervisor.stop()
        if member.child:
            stop_groups([member.child])
        supervisor.release()
        member.release()
        folder.remove()


def stats(options: argparse.Namespace) -> int:
    """One line per figure."""
    _show(ask_figures(options.socket or str(default_socket())))
    return 0


def drop(options: argparse.Namespace) -> int:
    """Forgets every complete block, then shows what is left."""
    _show(drop_all(options.socket or str(default_socket())))
    return 0


def _show(figures: dict[str, float]) -> None:
    for name, value in figures.items():
        print(f"{name:<20} {int(value):>16,}")


def _wait_ready(member: CacheMember) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not member.is_ready():
        code = member.exit_code()
        if code is not None or time.monotonic() > deadline:
            raise BatonError(f"the cache server did not start (exit code {code})\n{member.last_words()}".rstrip())
        time.sleep(_POLL_S)
