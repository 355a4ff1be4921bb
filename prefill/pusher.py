"""The sending worker: copies each layer's finished blocks to the receiver while the next layer is computed.

    forward pass:   layer 0 ──▶ layer 1 ──▶ ... ──▶ layer L-1      save_layer(i) is called right after layer i
    writes:            └─ blocks 0..k ─┘ └─ blocks 0..k ─┘ ...      of this chunk's finished blocks

A block is finished when all its tokens are computed, or when it is the last one asked for and the chunk reaches
it. Every layer keeps its own cursor, so blocks of a cached prefix, and what an earlier chunk left, travel with the
next call. The write that brings the last layer's cursor to the end carries the notice.

Memory and threads: runs in the engine's worker thread only. A transport may still be reading our blocks after a
call returned; the scheduler keeps them until `Pushed` or `quiet` says that no transfer is running.

Where a path fails under a hand-off, everything that is computed goes again over the next best one, once nothing runs on
the failed one any more: the receiver has a landing for each, and both would write the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from core.clock import Clock
from core.errors import TransferError
from prefill.connections import Connections
from prefill.peer_paths import Way
from prefill.push import PushChunk, PushCommands, Pushed, PushFailed, PushResults, PushTarget, Quiet
from transport.base import Blocks, Region, Transfer, TransferState
from transport.digest import BlockSum, HostSum, is_full
from transport.faultpoint import FaultPoint
from transport.regions import part_of


@dataclass
class _Push:
    """One hand-off under way."""

    chunk: PushChunk
    way: Way
    cursors: list[int]
    digest: BlockSum
    transfers: list[Transfer] = field(default_factory=list)
    num_pairs: int = 0
    num_bytes: int = 0
    moving_unix_s: float = 0.0
    last_layer_unix_s: float = 0.0
    computed_unix_s: float = 0.0
    bytes_before_last_layer: int = 0
    write_s: float = 0.0
    copy_s: float = 0.0
    digest_s: float = 0.0
    why_failed: str = ""
    stopped: bool = False
    failed_schemes: list[str] = field(default_factory=list)
    why_rerouted: str = ""

    @property
    def target(self) -> PushTarget:
        return self.chunk.target

    @property
    def end_block(self) -> int:
        return self.target.first_block + len(self.target.block_ids)

    def is_complete(self) -> bool:
        return min(self.cursors) >= self.end_block

    def begin_again(self, way: Way, digest: BlockSum) -> None:
        """From the first block, over another way; nothing of it is running."""
        self.digest.release()
        self.failed_schemes.append(self.way.scheme)
        self.why_rerouted = f"{self.way.scheme} failed: {self.why_failed}"
        self.way, self.why_failed, self.stopped = way, "", False
        self.cursors = [self.target.first_block] * len(self.cursors)
        self.digest, self.num_pairs, self.num_bytes = digest, 0, 0


@dataclass(frozen=True)
class PagedCache:
    """One worker's KV cache: regions, one per layer in layer order, of blocks of `block_size` tokens. begin_sum: how
    digests of its blocks are added up."""

    regions: Sequence[Region]
    block_size: int
    begin_sum: Callable[[], BlockSum] = HostSum


class Pusher:
    """Pushes every hand-off of this worker, which is one tensor-parallel rank, to each receiving rank that wants heads
    of it."""

    def __init__(
        self, connections: Connections, cache: PagedCache, clock: Clock, faults: FaultPoint, rank: int = 0
    ) -> None:
        self._rank = rank
        self._begin_sum = cache.begin_sum
        self._connections = connections
        self._regions = cache.regions
        self._block_size = cache.block_size
        self._clock = clock
        self._faults = faults
        self._pushes: dict[tuple[str, int], _Push] = {}
        self._stopping: list[str] = []
        self._chunks: list[PushChunk] = []
        self._results = PushResults()

    def begin_step(self, commands: PushCommands) -> None:
        """Takes one step's orders, before its forward pass."""
        for boot_id in commands.forget:
            self._connections.forget(boot_id)
        for handoff in commands.stop:
            self._stop(handoff)
        mine = [chunk for chunk in commands.chunks if chunk.target.lane.sender == self._rank]
        self._chunks = [chunk for chunk in mine if self._open(chunk)]

    def save_layer(self, layer: int) -> None:
        """Called right after `layer` has written its keys and values for all chunks of this step."""
        for chunk in self._chunks:
            push = self._pushes.get(chunk.key)
            if push is not None and not push.stopped:
                self._faults.reach("push", layer=layer, chunk=chunk.index)
                self._push_layer(push, chunk, layer)

    def sweep(self) -> None:
        """Called after the forward pass: pushes layers whose hook the engine never calls."""
        for layer in range(len(self._regions)):
            for chunk in self._chunks:
                push = self._pushes.get(chunk.key)
                if push is not None and not push.stopped:
                    self._push_layer(push, chunk, layer)
        now_s = self._clock.unix_s()
        for chunk in self._chunks:
            if chunk.key in self._pushes:
                self._pushes[chunk.key].computed_unix_s = now_s

    def end_step(self) -> PushResults:
        """What has ended since the last step; polls transfers in flight."""
        self._chunks = []
        for key, push in list(self._pushes.items()):
            self._settle(key, push)
        moving = {handoff for handoff, _ in self._pushes}
        self._results.quiet += [Quiet(handoff, self._rank) for handoff in self._stopping if handoff not in moving]
        self._stopping = [handoff for handoff in self._stopping if handoff in moving]
        results, self._results = self._results, PushResults()
        return results

    def num_in_flight(self) -> int:
        """Hand-offs whose end comes without a message: the engine should come back soon."""
        return sum(1 for push in self._pushes.values() if push.transfers or push.is_complete())

    def close(self) -> None:
        """Closes every endpoint: after this, nothing of this worker writes anywhere."""
        self._connections.close()
        for key in list(self._pushes):
            self._forget(key)

    def _open(self, chunk: PushChunk) -> bool:
        push = self._pushes.get(chunk.key)
        if push is not None:
            push.chunk = chunk
            return True
        target = chunk.target
        try:
            way = self._connections.pick(target.decode, target.schemes, rank=target.lane.receiver)
            digest = self._begin_sum()
        except TransferError as error:
            self._results.failed.append(PushFailed(chunk.handoff, str(error)))
            return False
        self._pushes[chunk.key] = _Push(chunk, way, [target.first_block] * len(self._regions), digest)
        return True

    def _push_layer(self, push: _Push, chunk: PushChunk, layer: int) -> None:
        # The last block asked for may be partial: it ends at the prompt's last token but one.
        covered = chunk.num_tokens >= push.target.num_tokens
        limit = push.end_block if covered else min(chunk.num_tokens // self._block_size, push.end_block)
        first = push.cursors[layer]
        if limit <= first:
            return
        if layer == len(self._regions) - 1:
            push.bytes_before_last_layer = push.num_bytes
            push.last_layer_unix_s = self._clock.unix_s()
        push.moving_unix_s = push.moving_unix_s or self._clock.unix_s()
        self._write(push, chunk, layer, range(first, limit))
        push.cursors[layer] = limit

    def _write(self, push: _Push, chunk: PushChunk, layer: int, span: range) -> None:
        lane = push.target.lane
        local_ids = chunk.block_ids[span.start : span.stop]
        offset = push.target.first_block
        remote_ids = push.target.block_ids[span.start - offset : span.stop - offset]
        others = (cursor for index, cursor in enumerate(push.cursors) if index != layer)
        is_last = span.stop == push.end_block and all(cursor >= push.end_block for cursor in others)
        notice = chunk.handoff.encode() if is_last else None
        local = Blocks(layer, tuple(local_ids), lane.sender_start, lane.num_bytes)
        remote = Blocks(layer, tuple(remote_ids), lane.receiver_start, lane.num_bytes)
        begun_s = self._clock.monotonic_s()
        full = is_full(push.way.scheme, push.target.full_digest)
        part = part_of(self._regions[layer], lane.sender_start, lane.num_bytes)
        try:
            push.transfers.append(push.way.endpoint.write(lane.tag(chunk.handoff), local, remote, notice))
            written_s = self._clock.monotonic_s()
            push.digest.add(part, local_ids, span.start - offset, full=full)
        except TransferError as error:
            push.why_failed, push.stopped = str(error), True
            return
        push.write_s += written_s - begun_s
        push.digest_s += self._clock.monotonic_s() - written_s
        push.num_pairs += len(span)
        push.num_bytes += len(span) * lane.num_bytes

    def _settle(self, key: tuple[str, int], push: _Push) -> None:
        states = [transfer.poll() for transfer in push.transfers]
        failures = [t.failure() for t, s in zip(push.transfers, states, strict=True) if s is TransferState.FAILED]
        running = [t for t, s in zip(push.transfers, states, strict=True) if s is TransferState.RUNNING]
        push.copy_s += sum(t.copy_s for t, s in zip(push.transfers, states, strict=True) if s is TransferState.DONE)
        push.transfers = running
        if failures and not push.stopped:
            push.why_failed = push.way.endpoint.failure() or failures[0] or "a write failed"
            push.stopped = True
            for transfer in running:
                transfer.cancel()
        if running:
            return
        if push.stopped:
            if push.why_failed and self._reroute(push):
                return
            if push.why_failed:
                self._results.failed.append(PushFailed(key[0], push.why_failed))
            self._forget(key)
        elif push.is_complete():
            self._complete(key, push)

    def _complete(self, key: tuple[str, int], push: _Push) -> None:
        """Every write is done: says so with the digest, once that is known."""
        try:
            digest = push.digest.value()
        except TransferError as error:
            self._results.failed.append(PushFailed(key[0], str(error)))
            self._forget(key)
            return
        if digest is None:
            return
        self._connections.wrote(push.way)
        self._results.pushed.append(self._pushed(key[0], push, digest))
        self._forget(key)

    def _forget(self, key: tuple[str, int]) -> None:
        self._pushes.pop(key).digest.release()

    def _reroute(self, push: _Push) -> bool:
        """Begins again over the next best path, if this one has failed and there is another."""
        if not self._connections.lost_write(push.way, push.why_failed):
            return False
        without = [*push.failed_schemes, push.way.scheme]
        try:
            way = self._connections.pick(push.target.decode, push.target.schemes, without, push.target.lane.receiver)
            push.begin_again(way, self._begin_sum())
        except TransferError:
            return False
        for layer in range(len(self._regions)):
            self._push_layer(push, push.chunk, layer)
        return True

    def _pushed(self, handoff: str, push: _Push, digest: int) -> Pushed:
        return Pushed(
            handoff=handoff,
            num_pairs=push.num_pairs,
            num_bytes=push.num_bytes,
            digest=digest,
            scheme=push.way.scheme,
            why_rerouted=push.why_rerouted,
            moving_unix_s=push.moving_unix_s,
            last_layer_unix_s=push.last_layer_unix_s,
            computed_unix_s=push.computed_unix_s,
            bytes_before_last_layer=push.bytes_before_last_layer,
            write_s=push.write_s,
            copy_s=push.copy_s,
            digest_s=push.digest_s,
            lane=push.target.lane,
        )

    def _stop(self, handoff: str) -> None:
        self._stopping.append(handoff)
        for push in [push for key, push in self._pushes.items() if key[0] == handoff]:
            push.stopped, push.why_failed = True, ""
            for transfer in push.transfers:
                transfer.cancel()
