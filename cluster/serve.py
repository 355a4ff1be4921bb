"""`baton serve`: a topology that stays up until it is stopped."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.bundled import served_model
from cluster.launcher import Cluster
from cluster.options import ClusterOptions, Start
from cluster.progress import Progress
from core.errors import BatonError
from kvcache.spec import CacheSpec

_POLL_S = 0.2


def run(options: argparse.Namespace) -> int:
    """Prints `ready http://HOST:PORT` on standard output, everything else on standard error."""
    cluster = Cluster(
        options.topology,
        ClusterOptions(
            model=served_model(options.model),
            host=options.host,
            port=options.port,
            open_control=options.open_control,
            proxy_arguments=("--share-between-keys",) if options.share_between_keys else (),
            transport=options.transport,
            start=Start(options.start) if options.start else None,
            arguments_prefill=options.prefill_args,
            arguments_decode=options.decode_args,
            cache=CacheSpec.parse(options.cache) if options.cache else None,
            keys=options.keys or "",
        ),
        Progress(sys.stderr),
    )
    with stopping(cluster):
        cluster.start()
        print(f"ready {cluster.url}", flush=True)
        while not cluster.failed:
            time.sleep(_POLL_S)
        raise BatonError(f"stopping: {cluster.failed} cannot be kept up")


@contextmanager
def stopping(cluster: Cluster) -> Iterator[None]:
    """Stops the cluster at the end, whatever ends it; a second Ctrl-C does not break the clean-up off."""
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        cluster.stop()
