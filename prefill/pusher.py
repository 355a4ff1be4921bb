"""The sending worker: copies each layer's finished blocks to the receiver while the next layer is computed.

    forward pass:   layer 0 ──▶ layer 1 ──▶ ... ──▶ layer L-1      save_layer(i) is called right after layer i
    writes:            └─ blocks 0..k ─┘ └─ blocks 0..k ─┘ ...      of this chunk's finished blocks

A block is finished when all its tokens are computed, or when it is the last one asked for and the chunk reaches
it. Every layer keeps its own cursor, so blocks of a cached prefix, and what an earlier chunk left, travel with the
next call. The write that brings the last layer's cursor to the end carries the notice.

Memory and threads: runs in the engine's worker thread only. A transport may still be reading our blocks after a
call returned; the scheduler keeps them until `Pushed` or `quiet` says that no transfer is running.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from core.clock import Clock
from core.errors import TransferError
from prefill.push import PushChunk, PushCommands, Pushed, PushFailed, PushResults, PushTarget, Quiet
from transport.base import Blocks, Endpoint, Region, Transfer, TransferState, Transport
from transport.choose import choose
from transport.digest import add, blocks_digest, is_full
from transport.faultpoint import FaultPoint
from transport.regions import part_of


@dataclass
class _Push:
    """One hand-off under way."""

    target: PushTarget
    scheme: str
    endpoint: Endpoint
    cursors: list[int]
    transfers: list[Transfer] = field(default_factory=list)
    digest: int = 0
    num_pairs: int = 0
    num_bytes: int = 0
    moving_unix_s: float = 0.0
    last_layer_unix_s: float = 0.0
    computed_unix_s: float = 0.0
    bytes_before_last_layer: int = 0
    write_s: float = 0.0
    digest_s: float = 0.0
    why_failed: str = ""
    stopped: bool = False

    @property
    def end_block(self) -> int:
        return self.target.first_block + len(self.target.block_ids)

    def is_complete(self) -> bool:
        return min(self.cursors) >= self.end_block

    def is_quiet(self) -> bool:
        return all(t.poll() is not TransferState.RUNNING for t in self.transfers)


class Pusher:
    """Pushes every hand-off of this worker, which is one tensor-parallel rank, to each receiving rank that wants heads
    of it. `regions` are its KV cache, one per layer in layer order."""

    def __init__(
        self,
        transports: Mapping[str, Transport],
        regions: Sequence[Region],
        block_size: int,
        clock: Clock,
        faults: FaultPoint,
        rank: int = 0,
    ) -> None:
        self._rank = rank
        self._transports = transports
        self._regions = regions
        self._block_size = block_size
        self._clock = clock
        self._faults = faults
        self._endpoints: dict[tuple[str, int, str], Endpoint] = {}
        self._pushes: dict[tuple[str, int], _Push] = {}
        self._stopping: list[str] = []
        self._chunks: list[PushChunk] = []
        self._results = PushResults()

    def begin_step(self, commands: PushCommands) -> None:
        """Takes one step's orders, before its forward pass."""
        for boot_id in commands.forget:
            for key in [key for key in self._endpoints if key[0] == boot_id]:
                self._endpoints.pop(key).close()
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
        """Hand-offs with a write in flight: the engine should come back soon."""
        return sum(1 for push in self._pushes.values() if push.transfers)

    def num_endpoints(self) -> int:
        """Peers whose memory is reachable from here."""
        return len(self._endpoints)

    def close(self) -> None:
        """Closes every endpoint: after this, nothing of this worker writes anywhere."""
        for endpoint in self._endpoints.values():
            endpoint.close()
        self._endpoints.clear()
        self._pushes.clear()

    def _open(self, chunk: PushChunk) -> bool:
        if chunk.key in self._pushes:
            return True
        target = chunk.target
        try:
            scheme, description = choose(target.schemes, self._transports)
            endpoint = self._endpoint(target, scheme, description)
        except TransferError as error:
            self._results.failed.append(PushFailed(chunk.handoff, str(error)))
            return False
        cursors = [target.first_block] * len(self._regions)
        self._pushes[chunk.key] = _Push(target, scheme, endpoint, cursors)
        return True

    def _endpoint(self, target: PushTarget, scheme: str, description: bytes) -> Endpoint:
        key = target.decode.boot_id, target.lane.receiver, scheme
        endpoint = self._endpoints.get(key)
        if endpoint is None or endpoint.failure():
            if endpoint is not None:
                endpoint.close()
            endpoint = self._transports[scheme].connect(description)
            self._endpoints[key] = endpoint
        return endpoint

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
        try:
            push.transfers.append(push.endpoint.write(lane.tag(chunk.handoff), local, remote, notice))
        except TransferError as error:
            push.why_failed, push.stopped = str(error), True
            return
        written_s = self._clock.monotonic_s()
        full = is_full(push.scheme, push.target.full_digest)
        part = part_of(self._regions[layer], lane.sender_start, lane.num_bytes)
        digest = blocks_digest(part, local_ids, span.start - offset, full=full)
        push.digest = add(push.digest, digest)
        push.write_s += written_s - begun_s
        push.digest_s += self._clock.monotonic_s() - written_s
        push.num_pairs += len(span)
        push.num_bytes += len(span) * lane.num_bytes

    def _settle(self, key: tuple[str, int], push: _Push) -> None:
        states = [transfer.poll() for transfer in push.transfers]
        failures = [t.failure() for t, s in zip(push.transfers, states, strict=True) if s is TransferState.FAILED]
        running = [t for t, s in zip(push.transfers, states, strict=True) if s is TransferState.RUNNING]
        push.transfers = running
        if failures and not push.stopped:
            push.why_failed, push.stopped = failures[0] or "a write failed", True
            for transfer in running:
                transfer.cancel()
        if running:
            return
        if push.stopped:
            if push.why_failed:
                self._results.failed.append(PushFailed(key[0], push.why_failed))
            del self._pushes[key]
        elif push.is_complete():
            self._results.pushed.append(self._pushed(key[0], push))
            del self._pushes[key]

    def _pushed(self, handoff: str, push: _Push) -> Pushed:
        return Pushed(
            handoff=handoff,
            num_pairs=push.num_pairs,
            num_bytes=push.num_bytes,
            digest=push.digest,
            scheme=push.scheme,
            moving_unix_s=push.moving_unix_s,
            last_layer_unix_s=push.last_layer_unix_s,
            computed_unix_s=push.computed_unix_s,
            bytes_before_last_layer=push.bytes_before_last_layer,
            write_s=push.write_s,
            digest_s=push.digest_s,
            lane=push.target.lane,
        )

    def _stop(self, handoff: str) -> None:
        self._stopping.append(handoff)
        for push in [push for key, push in self._pushes.items() if key[0] == handoff]:
            push.stopped = True
            for transfer in push.transfers:
                transfer.cancel()
