"""`baton instance`: one instance, started plainly, that joins a proxy here or on another host."""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from cluster import plan
from cluster.bundled import served_model
from cluster.cache import socket_of
from cluster.members import InstanceMember, get, plain_starter
from cluster.ports import check_free, free_ports
from cluster.processes import stop_groups
from cluster.progress import Progress
from cluster.runfolder import RunFolder
from core.errors import BatonError
from core.handoff import Role
from engine.build import Build, installed_build
from engine.instance import ENV_VLLM_CORES, InstanceSpec, cache_folder, num_ranks
from transport.join import check_keys, parse_proxy_url
from transport.keys import read_keys

_POLL_S = 0.2


def run(options: argparse.Namespace) -> int:
    """Prints `ready http://HOST:PORT` when the instance answers; stays up until it is stopped."""
    build = installed_build()
    spec = _spec(options)
    plan.check([spec], build)
    folder = RunFolder.create()
    member = _member(spec, folder, build)
    try:
        member.start()
        _stay(member, Progress(sys.stderr))
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if member.child:
            stop_groups([member.child])
        folder.remove()
    return 0


def _spec(options: argparse.Namespace) -> InstanceSpec:
    parse_proxy_url(options.join)
    if options.port:
        check_free(options.port, options.host)
    port = options.port or free_ports(1, options.host)[0]
    connector = {"cache": socket_of(options.cache)} if options.cache else {}
    keys = read_keys(options.keys) if options.keys else None
    check_keys(options.join, keys)
    if options.keys:
        connector["keys"] = os.path.abspath(options.keys)
    return InstanceSpec(
        name=options.name or f"{options.role}-{socket.gethostname()}-{secrets.token_hex(2)}",
        role=Role(options.role),
        model=served_model(options.model),
        host=options.host,
        port=port,
        join=options.join,
        transport=options.transport,
        cores=_cores(options.passed),
        arguments=options.passed,
        connector=connector,
    )


def _cores(arguments: Sequence[str]) -> tuple[int, ...]:
    """vLLM binds one process by itself; several only where each has a memory node of its own, so they share evenly."""
    if num_ranks(arguments) == 1 or os.environ.get(ENV_VLLM_CORES):
        return ()
    return tuple(sorted(os.sched_getaffinity(0)))


def _member(spec: InstanceSpec, folder: RunFolder, build: Build) -> InstanceMember:
    log = folder.path / "instance.log"
    variables = spec.variables(folder.subfolder("vllm"), cache_folder(), build.device)
    return InstanceMember(spec, log, plain_starter(spec, log, variables, build.device))


def _stay(member: InstanceMember, progress: Progress) -> None:
    """Raises BatonError with its last words when the instance ends by itself."""
    ready = False
    while (code := member.exit_code()) is None:
        if not ready and get(f"{member.url}/health")[0] == 200:
            ready = True
            progress.done(f"{member.name} is up")
            with suppress(BrokenPipeError):
                print(f"ready {member.url}", flush=True)
        if not ready:
            progress.waiting(f"waiting for {member.name}")
        time.sleep(_POLL_S)
    raise BatonError(f"{member.name} ended with exit code {code}\n{member.last_words()}".rstrip())
