"""`baton cache serve | stats | ls | pin | unpin | drop`: the host's KV cache by hand."""

from __future__ import annotations

import argparse
import difflib
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
from kvcache.client import ask_figures, drop_all, drop_label, labels, pin_label
from kvcache.spec import CacheSpec
from kvcache.wire import LabelFigures

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
    _show(ask_figures(_socket_of(options)))
    return 0


def ls(options: argparse.Namespace) -> int:
    """One line per label, the oldest first."""
    found = labels(_socket_of(options))
    width = max([len("label"), *(len(label.name) for label in found)])
    print(f"{'label':<{width}} {'tokens':>10} {'blocks':>15} {'bytes':>16} {'pinned':>6} {'expires':>9}")
    for label in found:
        blocks = f"{label.blocks:,}/{label.num_blocks:,}"
        pinned = "yes" if label.pinned else "no"
        print(
            f"{label.name:<{width}} {label.num_tokens:>10,} {blocks:>15} {label.num_bytes:>16,} {pinned:>6} "
            f"{_expiry(label):>9}"
        )
    return 0


def pin(options: argparse.Namespace) -> int:
    """Keeps a label's blocks. Raises ConfigError if there is no such label."""
    return _pin(options, pinned=True)


def unpin(options: argparse.Namespace) -> int:
    """Lets a label's blocks be evicted. Raises ConfigError if there is no such label."""
    return _pin(options, pinned=False)


def drop(options: argparse.Namespace) -> int:
    """Forgets a label and its blocks, or every block; then shows what is left. Raises ConfigError if there is no such
    label."""
    socket = _socket_of(options)
    if options.label is None:
        _drop_all(socket)
    elif drop_label(socket, options.label):
        _show(ask_figures(socket))
    else:
        raise _unknown(socket, options.label)
    return 0


def _drop_all(socket: str) -> None:
    before = ask_figures(socket)
    figures = drop_all(socket)
    _show(figures)
    kept = [name for name, value in figures.items() if name.endswith("_uncleared") and value > before.get(name, 0)]
    if kept or figures["clearing"]:
        tiers = ", ".join(name.removesuffix("_uncleared") for name in kept) or "a tier"
        raise BatonError(f"{tiers} did not forget its blocks; see the server's log, and try again")


def _pin(options: argparse.Namespace, *, pinned: bool) -> int:
    socket = _socket_of(options)
    if not pin_label(socket, options.label, pinned):
        raise _unknown(socket, options.label)
    return ls(options)


def _unknown(socket: str, label: str) -> ConfigError:
    known = [known.name for known in labels(socket)]
    near = difflib.get_close_matches(label, known, n=1, cutoff=0.5) or known[:1]
    hint = f"did you mean {near[0]}?" if near else "it has none: a request's ticket carries them"
    return ConfigError(f"the cache server at {socket} has no label {label!r}; {hint}")


def _expiry(label: LabelFigures) -> str:
    return "never" if label.expires_in_s is None else f"{label.expires_in_s:,.0f} s"


def _socket_of(options: argparse.Namespace) -> str:
    return options.socket or str(default_socket())


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
