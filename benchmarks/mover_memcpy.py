"""The yardstick of `baton bench transfer`: a memcpy per piece from source to target, in one process.

It knows of no peer, tells nobody, and checks nothing: what one core can copy, with the same block numbers and the same
cold memory as everybody else. Pieces are assigned from one view of memory to another, which is a memcpy with the least
that Python can put around it.
"""

from __future__ import annotations

from benchmarks.kv_pool import Pool
from benchmarks.mover import Ground, Job
from transport.regions import view


class MemcpySender:
    """See benchmarks/mover.py."""

    def __init__(self, source: Pool, target: Pool) -> None:
        self._shape = source.shape
        self._source, self._target = (view(pool.address, pool.shape.num_bytes) for pool in (source, target))

    def connect(self, description: bytes) -> None:
        return

    def write(self, job: Job, layers: range, *, is_last: bool) -> None:
        source, target, size = self._source, self._target, self._shape.piece_bytes
        for layer in layers:
            start = layer * self._shape.num_blocks
            for local_id, remote_id in zip(job.local_ids, job.remote_ids, strict=True):
                from_at, to_at = (start + local_id) * size, (start + remote_id) * size
                target[to_at : to_at + size] = source[from_at : from_at + size]

    def finish(self) -> bool:
        return True

    def close(self) -> None:
        return


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
