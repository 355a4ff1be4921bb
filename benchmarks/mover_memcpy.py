"""The yardstick of `baton bench transfer`: a memcpy per piece from source to target, in one process.

It knows of no peer, tells nobody, and checks nothing: what one core can copy, with the same block numbers and the same
cold memory as everybody else.
"""

from __future__ import annotations

from benchmarks.kv_pool import Pool
from benchmarks.mover import Ground, Job
from transport.regions import Span, copy_pairs


class MemcpySender:
    """See benchmarks/mover.py."""

    def __init__(self, source: Pool, target: Pool) -> None:
        self._size = source.shape.piece_bytes
        self._sources, self._targets = source.regions(), target.regions()

    def connect(self, description: bytes) -> None:
        return

    def write(self, job: Job, layers: range, *, is_last: bool) -> None:
        for layer in layers:
            source, target = (Span(regions[layer], 0, self._size) for regions in (self._sources, self._targets))
            copy_pairs(source, job.local_ids, target, job.remote_ids)

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
