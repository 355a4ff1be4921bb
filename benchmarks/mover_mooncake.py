"""Mooncake's transfer engine as a peer of `baton bench transfer`: synchronous batches of writes, over TCP.

Its packages lie in a folder of their own (`scripts/mooncake_env FOLDER`) that only these processes see. The receiver
learns of nothing (Mooncake's users send a message of their own afterwards), so the sender's end is the job's end.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.kv_pool import Pool
from benchmarks.mover import Ground, Job
from cluster.ports import LOOPBACK
from core.errors import ConfigError, TransferError
from engine.instance import source_path

VERSION = "0.3.13.post1"
_MOST_PIECES = 1024
"""Its TCP transport refuses batches of several thousand: its queue is full."""

_LIBRARIES = ("system/usr/lib/x86_64-linux-gnu", "system/lib/x86_64-linux-gnu")


class _Place(msgspec.Struct, frozen=True):
    """Where the receiver's pool is."""

    engine: str
    address: int


def check_folder(folder: Path) -> Path:
    """The folder of `scripts/mooncake_env`. Raises ConfigError if it is none."""
    if not (folder / f"mooncake_transfer_engine_non_cuda-{VERSION}.dist-info").is_dir():
        raise ConfigError(f"{folder} does not hold Mooncake {VERSION}; make it: scripts/mooncake_env {folder}")
    return folder.absolute()


def variables(folder: Path) -> dict[str, str]:
    """What its processes have in their environment."""
    libraries = [str(folder / each) for each in _LIBRARIES]
    return {
        "PYTHONPATH": os.pathsep.join([source_path(), str(folder)]),
        "LD_LIBRARY_PATH": os.pathsep.join([*libraries, os.environ.get("LD_LIBRARY_PATH", "")]),
        "MC_TE_METRIC": "0",
    }


class MooncakeSender:
    """See benchmarks/mover.py."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._engine = _engine(pool)
        self._peer = ""
        self._target = pool

    def connect(self, description: bytes) -> None:
        place = msgspec.msgpack.decode(description, type=_Place)
        self._peer, self._target = place.engine, Pool(self._pool.shape, place.address)

    def write(self, job: Job, layers: range, *, is_last: bool) -> None:
        sources = [self._pool.address_of(layer, each) for layer in layers for each in job.local_ids]
        targets = [self._target.address_of(layer, each) for layer in layers for each in job.remote_ids]
        for at in range(0, len(sources), _MOST_PIECES):
            batch = sources[at : at + _MOST_PIECES], targets[at : at + _MOST_PIECES]
            sizes = [self._pool.shape.piece_bytes] * len(batch[0])
            code = self._engine.batch_transfer_sync_write(self._peer, *batch, sizes)
            if code != 0:
                raise TransferError(f"Mooncake's engine failed with {code}")

    def finish(self) -> bool:
        return True

    def close(self) -> None:
        self._engine.unregister_memory(self._pool.address)


class MooncakeReceiver:
    """See benchmarks/mover.py."""

    def __init__(self, pool: Pool) -> None:
        self._engine = _engine(pool)
        self._pool = pool

    def describe(self) -> bytes:
        return msgspec.msgpack.encode(_Place(f"{LOOPBACK}:{self._engine.get_rpc_port()}", self._pool.address))

    def expect(self, job: Job) -> None:
        return

    def receive(self) -> None:
        return

    def close(self) -> None:
        self._engine.unregister_memory(self._pool.address)


def _engine(pool: Pool) -> Any:
    """One engine whose pool is registered."""
    engine: Any = importlib.import_module("mooncake.engine").TransferEngine()
    if engine.initialize(LOOPBACK, "P2PHANDSHAKE", "tcp", "") != 0:
        raise TransferError("Mooncake's engine does not start")
    if engine.register_memory(pool.address, pool.shape.num_bytes) != 0:
        raise TransferError("Mooncake's engine does not take the memory")
    return engine


def sender(ground: Ground) -> MooncakeSender:
    return MooncakeSender(ground.pool)


def receiver(ground: Ground) -> MooncakeReceiver:
    return MooncakeReceiver(ground.pool)
