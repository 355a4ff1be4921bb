"""NIXL used directly as a peer of `baton bench transfer`: prepared descriptors of every piece, one transfer per write.

    both ends    register the pool, once         sender    prepare descriptor lists of both pools, once
    write        make a transfer from two lists of indices, post it with a notification
    receiver     looks for as many notifications as there are writes

`nixl` is the UCX back end as it comes; `nixl-tuned` is the fastest set-up that we found on CPUs: shared-memory
transports alone, without error handling between peers (a peer's death then hangs the other).
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import msgspec

from benchmarks.kv_pool import Pool
from benchmarks.mover import Ground, Job, Pause, wait_until
from core.errors import TransferError

TUNED = "nixl-tuned"
TUNED_ENVIRONMENT = {"UCX_TLS": "posix,self"}


class _Agent(msgspec.Struct, frozen=True):
    """What the sender must know of the receiver."""

    metadata: bytes
    address: int


def unavailable() -> str:
    """Why it cannot run here; empty if it can."""
    return "" if find_spec("nixl") else "the package nixl is not installed"


class NixlSender:
    """See benchmarks/mover.py."""

    def __init__(self, name: str, pool: Pool) -> None:
        self._pool = pool
        self._agent = _agent(f"{name}-sender", name, pool)
        self._peer = ""
        self._local: Any = None
        self._remote: Any = None
        self._handles: list[Any] = []

    def connect(self, description: bytes) -> None:
        agent = msgspec.msgpack.decode(description, type=_Agent)
        peer = self._agent.add_remote_agent(agent.metadata)
        self._peer = peer.decode() if isinstance(peer, bytes) else peer
        target = Pool(self._pool.shape, agent.address)
        self._local = self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", _pieces(self._pool), "DRAM")
        self._remote = self._agent.prep_xfer_dlist(self._peer, _pieces(target), "DRAM")

    def write(self, job: Job, layers: range, *, is_last: bool) -> None:
        handle = self._agent.make_prepped_xfer(
            "WRITE",
            self._local,
            self._indices(layers, job.local_ids),
            self._remote,
            self._indices(layers, job.remote_ids),
            job.tag.encode(),
        )
        if self._agent.transfer(handle) == "ERR":
            raise TransferError("NIXL refused a transfer")
        self._handles.append(handle)

    def finish(self) -> bool:
        pause = Pause("the transfers end")
        while self._handles:
            state = self._agent.check_xfer_state(self._handles[0])
            if state == "ERR":
                raise TransferError("a NIXL transfer failed")
            if state == "DONE":
                self._agent.release_xfer_handle(self._handles.pop(0))
            else:
                pause.rest()
        return False

    def close(self) -> None:
        return

    def _indices(self, layers: range, ids: tuple[int, ...]) -> Any:
        import numpy as np

        starts = np.arange(layers.start, layers.stop, dtype=np.int32) * self._pool.shape.num_blocks
        return (starts[:, None] + np.array(ids, np.int32)[None, :]).reshape(-1)


class NixlReceiver:
    """See benchmarks/mover.py."""

    def __init__(self, name: str, pool: Pool) -> None:
        self._pool = pool
        self._agent = _agent(f"{name}-receiver", name, pool)
        self._num_left = 0

    def describe(self) -> bytes:
        return msgspec.msgpack.encode(_Agent(self._agent.get_agent_metadata(), self._pool.address))

    def expect(self, job: Job) -> None:
        self._num_left = job.num_writes

    def receive(self) -> None:
        wait_until(self._are_all_here, "the notifications arrive")

    def close(self) -> None:
        return

    def _are_all_here(self) -> bool:
        self._num_left -= sum(len(words) for words in self._agent.get_new_notifs().values())
        return self._num_left <= 0


def _agent(name: str, setting: str, pool: Pool) -> Any:
    """An agent whose pool is registered."""
    api: Any = importlib.import_module("nixl._api")
    agent = api.nixl_agent(name, api.nixl_agent_config(backends=[] if setting == TUNED else ["UCX"]))
    if setting == TUNED:
        agent.create_backend("UCX", {"ucx_error_handling_mode": "none"})
    agent.register_memory([(pool.address, pool.shape.num_bytes, 0, "")], "DRAM")
    return agent


def _pieces(pool: Pool) -> Any:
    """(address, bytes, device) of every piece, layer by layer."""
    import numpy as np

    size = pool.shape.piece_bytes
    count = pool.shape.num_layers * pool.shape.num_blocks
    pieces = np.empty((count, 3), np.uint64)
    pieces[:, 0] = np.uint64(pool.address) + np.arange(count, dtype=np.uint64) * np.uint64(size)
    pieces[:, 1], pieces[:, 2] = size, 0
    return pieces


def sender(ground: Ground) -> NixlSender:
    return NixlSender(ground.name, ground.pool)


def receiver(ground: Ground) -> NixlReceiver:
    return NixlReceiver(ground.name, ground.pool)
