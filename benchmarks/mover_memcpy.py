"""The yardstick of `baton bench transfer`: a memcpy per piece from source to target, in one process.

It knows of no peer, tells nobody, and checks nothing: what one core can copy, with the same block numbers and the same
cold memory as everybody else. A layer's pieces are copied by one call of a compiled loop over memcpy
(transport/native_loops.py); where there is no numba, they are assigned from one view of memory to another.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.kv_pool import Pool
from benchmarks.mover import Ground, Job
from transport import native
from transport.regions import view


class MemcpySender:
    """See benchmarks/mover.py."""

    def __init__(self, source: Pool, target: Pool) -> None:
        self._shape = source.shape
        self._pools = source, target
        native.compile_now()

    def connect(self, description: bytes) -> None:
        return

    def write(self, job: Job, layers: range, *, is_last: bool) -> None:
        size, loops = self._shape.piece_bytes, native.compiled()
        layer_bytes = self._shape.num_blocks * size
        pairs = zip(job.local_ids, job.remote_ids, strict=True)
        pieces = [(local_id * size, remote_id * size, size) for local_id, remote_id in pairs]
        addresses = [tuple(pool.address + layer * layer_bytes for pool in self._pools) for layer in layers]
        if loops is None:
            _assign(pieces, addresses)
        else:
            loops.copy_pieces(native.table_of(pieces), native.table_of(addresses))

    def finish(self) -> bool:
        return True

    def close(self) -> None:
        return


def _assign(pieces: Sequence[tuple[int, int, int]], addresses: Sequence[tuple[int, ...]]) -> None:
    for source, target in addresses:
        for from_at, to_at, num_bytes in pieces:
            view(target + to_at, num_bytes)[:] = view(source + from_at, num_bytes)


class AbsentReceiver:
    """A receiver that never learns of anything: the sender's end is the end. `words` is what the sender must know."""

    def __init__(self, words: bytes = b"") -> None:
        self._words = words

    def describe(self) -> bytes:
        return self._words

    def expect(self, job: Job) -> None:
        return

    def receive(self) -> None:
        return

    def close(self) -> None:
        return


def sender(ground: Ground) -> MemcpySender:
    return MemcpySender(ground.pool, ground.other)


def receiver(ground: Ground) -> AbsentReceiver:
    return AbsentReceiver()
