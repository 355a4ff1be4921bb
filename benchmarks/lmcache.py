"""LMCache beside us: its server, and a vLLM with its connector, from packages in a folder of their own.

    lmcache server (host memory, below it disk or Redis) ◀── its protocol ── vLLM with LMCacheMPConnector

What its server and connector need lies in one folder (`scripts/lmcache_env`) that only these processes see, beside
the environment of everybody else: the same Python, vLLM and torch. LMCache has no CUDA here and falls back to its own
copies in Python and torch, synchronous in the worker's step: figures of this are not figures of LMCache on a GPU.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from cluster.logs import last_lines
from cluster.members import get
from cluster.ports import LOOPBACK, free_ports
from cluster.processes import start_child, stop_groups
from core.errors import BatonError, ConfigError
from engine.instance import source_path

VERSION = "0.5.6"
CHUNK_TOKENS = 128
"""The block size: with its default of 256 it would compute 128 tokens more of a 4,000-token prompt."""

START_TIMEOUT_S = 60.0
_POLL_S = 0.1
_SHARED_MEMORY = Path("/dev/shm")


class LMCacheServer(msgspec.Struct, frozen=True):
    """Where it listens."""

    port: int
    http_port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.http_port}"

    def clear(self) -> None:
        """Empties its host memory; what lies below stays. Raises BatonError."""
        connection = http.client.HTTPConnection(LOOPBACK, self.http_port, timeout=10.0)
        try:
            connection.request("POST", "/cache/clear")
            response = connection.getresponse()
            response.read()
        except (OSError, http.client.HTTPException) as error:
            raise BatonError(f"LMCache's server cannot be emptied: {error}") from error
        finally:
            connection.close()
        if response.status != 200:
            raise BatonError(f"LMCache's server cannot be emptied: status {response.status}")


def check_folder(folder: Path) -> Path:
    """The folder of `scripts/lmcache_env`. Raises ConfigError if it is none."""
    if not (folder / f"lmcache-{VERSION}.dist-info").is_dir():
        raise ConfigError(f"{folder} does not hold LMCache {VERSION}; make it: scripts/lmcache_env {folder}")
    return folder.absolute()


def variables(folder: Path) -> dict[str, str]:
    """What both of its processes have in their environment."""
    return {
        "PYTHONPATH": os.pathsep.join([str(folder), source_path()]),
        "LMCACHE_TRACK_USAGE": "false",
        "LMCACHE_DISABLE_BANNER": "1",
    }


def engine_arguments(server: LMCacheServer) -> tuple[str, ...]:
    """What its vLLM gets beyond everybody's arguments."""
    config = {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"lmcache.mp.port": server.port},
    }
    return ("--disable-hybrid-kv-cache-manager", "--kv-transfer-config", json.dumps(config))


@contextmanager
def lmcache_server(
    folder: Path, run_folder: Path, num_bytes: int, adapter: dict[str, object]
) -> Iterator[LMCacheServer]:
    """A server with so much host memory. adapter: of the tier below; empty without one. Raises BatonError."""
    port, http_port, metrics_port = free_ports(3, LOOPBACK)
    server = LMCacheServer(port, http_port, run_folder / f"lmcache-{port}.log")
    shared = f"baton-bench-{port}"
    command = [sys.executable, "-P", str(folder / "bin" / "lmcache"), "server", "--port", str(port)]
    command += ["--http-port", str(http_port), "--prometheus-port", str(metrics_port), "--shm-name", shared]
    command += ["--l1-size-gb", f"{num_bytes / 2**30:g}", "--eviction-policy", "LRU"]
    command += ["--chunk-size", str(CHUNK_TOKENS), "--supported-transfer-mode", "auto"]
    command += ["--l2-adapter", json.dumps(adapter)] if adapter else []
    child = start_child(command, variables(folder), server.log)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while get(f"{server.url}/healthcheck")[0] != 200:
            if child.poll() is not None or time.monotonic() > deadline:
                raise BatonError("LMCache's server did not start\n" + "\n".join(last_lines(server.log)))
            time.sleep(_POLL_S)
        yield server
    finally:
        stop_groups([child])
        _remove_shared(shared, child.pid)


def _remove_shared(name: str, pid: int) -> None:
    """What it leaves in shared memory."""
    for path in (*_SHARED_MEMORY.glob(f"*{name}*"), *_SHARED_MEMORY.glob(f"lmcache_kv_{pid}_*")):
        with suppress(OSError):
            path.unlink()
