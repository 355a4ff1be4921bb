"""Any transport, made unreliable on purpose: delays, drops, truncation, flipped bytes, a lost connection.

Memory model: a corrupted write copies its source blocks into scratch memory, damages the copy, and writes that; the
scratch memory lives as long as the transport. The sender's own blocks stay as they are, so its digest stays right.
Threading: as the wrapped transport; faults are decided in `write` by a count of writes over all endpoints, from 0.
Writes between scratch regions, which measure a path, are delayed like others, but neither counted nor damaged.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from core.clock import Clock, SystemClock
from core.errors import ConfigError, TransferError
from transport.base import Blocks, Endpoint, Landing, Memory, Region, Transfer, TransferState, Transport
from transport.copying import copy_pairs
from transport.regions import Span, resolve
from transport.scratch import SCRATCH_REGION
from transport.transfer import JoinedTransfer, SettledTransfer

_FIRST_SCRATCH_REGION = 1 << 30


class Faults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What goes wrong; the numbers of writes count from 0. Nothing does by default.

    delay_polls, delay_s: every transfer stays RUNNING for so many polls and seconds.
    drop_write: this write moves nothing and stays RUNNING until cancelled, or for drop_polls polls and then FAILED.
    truncate_write: this write leaves out the second half of its last block.
    flip_write: this write arrives with byte `flip_byte` (counted over its blocks, modulo their size) inverted.
    disconnect_after: after so many writes, the endpoint is closed under the writer, once.
    """

    delay_polls: int = 0
    delay_s: float = 0.0
    drop_write: int | None = None
    drop_polls: int | None = None
    truncate_write: int | None = None
    flip_write: int | None = None
    flip_byte: int = 0
    disconnect_after: int | None = None


class FaultyTransport:
    """Wraps a transport. See transport/base.py."""

    def __init__(self, inner: Transport, faults: Faults, clock: Clock | None = None) -> None:
        self.scheme = inner.scheme
        self.inner = inner
        self.faults = faults
        self.clock = clock or SystemClock()
        self.num_writes = 0
        self.regions: dict[int, Region] = {}
        self._scratch: list[ctypes.Array[ctypes.c_char]] = []

    def allocate(self, num_bytes: int) -> Memory | None:
        return self.inner.allocate(num_bytes)

    def register(self, region: Region) -> None:
        self.inner.register(region)
        self.regions[region.id] = region

    def describe(self) -> bytes:
        return self.inner.describe()

    def connect(self, description: bytes) -> FaultyEndpoint:
        return FaultyEndpoint(self, self.inner.connect(description))

    def expect(self, tag: str, blocks: Sequence[Blocks]) -> Landing:
        return self.inner.expect(tag, blocks)

    def close(self) -> None:
        self.inner.close()

    def flipped(self, local: Blocks) -> Blocks:
        """The same blocks in scratch memory, with one byte inverted."""
        span = resolve(self.regions, local, "local")
        num_bytes = len(local.ids) * span.num_bytes
        memory = ctypes.create_string_buffer(max(num_bytes, 1))
        shape = (span.num_bytes, span.num_bytes, max(len(local.ids), 1))
        scratch = Region(_FIRST_SCRATCH_REGION + len(self._scratch), ctypes.addressof(memory), *shape)
        ids = tuple(range(len(local.ids)))
        copy_pairs(span, local.ids, Span(scratch, 0, span.num_bytes), ids)
        at = self.faults.flip_byte % max(num_bytes, 1)
        memory[at] = bytes([memory.raw[at] ^ 0xFF])
        self._scratch.append(memory)
        self.inner.register(scratch)
        return Blocks(scratch.id, ids)


class FaultyEndpoint:
    """Wraps an endpoint."""

    def __init__(self, transport: FaultyTransport, inner: Endpoint) -> None:
        self._transport = transport
        self._inner = inner
        self._why_failed = ""

    def write(self, tag: str, local: Blocks, remote: Blocks, notice: bytes | None = None) -> Transfer:
        if local.region == SCRATCH_REGION:
            failed = SettledTransfer(self._why_failed) if self._why_failed else None
            return failed or self._delayed(self._inner.write(tag, local, remote, notice))
        faults, index = self._transport.faults, self._transport.num_writes
        self._transport.num_writes += 1
        if index == faults.disconnect_after:
            self._inner.close()
            self._why_failed = "disconnected by a fault"
        if self._why_failed:
            return SettledTransfer(self._why_failed)
        if index == faults.drop_write:
            return DroppedTransfer(faults.drop_polls)
        if index == faults.truncate_write and local.ids:
            return self._delayed(self._truncated(tag, local, remote, notice))
        if index == faults.flip_write and local.ids:
            return self._delayed(self._inner.write(tag, self._transport.flipped(local), remote, notice))
        return self._delayed(self._inner.write(tag, local, remote, notice))

    def read(self, remote: Blocks, local: Blocks) -> Transfer:
        return self._delayed(self._inner.read(remote, local))

    def failure(self) -> str:
        return self._why_failed or self._inner.failure()

    def close(self) -> None:
        self._inner.close()

    def _truncated(self, tag: str, local: Blocks, remote: Blocks, notice: bytes | None) -> Transfer:
        span = resolve(self._transport.regions, local, "local")
        num_bytes = max(span.num_bytes // 2, 1)
        whole = self._inner.write(tag, _slice(local, 0, -1), _slice(remote, 0, -1))
        half_local = msgspec.structs.replace(_slice(local, -1, None), num_bytes=num_bytes)
        half_remote = msgspec.structs.replace(_slice(remote, -1, None), num_bytes=num_bytes)
        return JoinedTransfer([whole, self._inner.write(tag, half_local, half_remote, notice)])

    def _delayed(self, transfer: Transfer) -> Transfer:
        faults = self._transport.faults
        if not faults.delay_polls and not faults.delay_s:
            return transfer
        return DelayedTransfer(transfer, faults, self._transport.clock)


class DroppedTransfer:
    """Moves nothing; RUNNING until cancelled, or for so many polls."""

    copy_s = 0.0

    def __init__(self, num_polls: int | None) -> None:
        self._polls_left = num_polls
        self._why_failed = ""

    def poll(self) -> TransferState:
        if self._polls_left is not None and not self._why_failed:
            self._polls_left -= 1
            if self._polls_left < 0:
                self._why_failed = "dropped by a fault"
        return TransferState.FAILED if self._why_failed else TransferState.RUNNING

    def cancel(self) -> None:
        self._why_failed = self._why_failed or "cancelled"

    def failure(self) -> str:
        return self._why_failed


class DelayedTransfer:
    """Reports what the wrapped transfer is only after a while."""

    def __init__(self, inner: Transfer, faults: Faults, clock: Clock) -> None:
        self._inner = inner
        self._polls_left = faults.delay_polls
        self._clock = clock
        self._until_s = clock.monotonic_s() + faults.delay_s

    @property
    def copy_s(self) -> float:
        return self._inner.copy_s

    def poll(self) -> TransferState:
        state = self._inner.poll()
        self._polls_left -= 1
        if self._polls_left >= 0 or self._clock.monotonic_s() < self._until_s:
            return TransferState.RUNNING
        return state

    def cancel(self) -> None:
        self._inner.cancel()

    def failure(self) -> str:
        return self._inner.failure()


def _slice(blocks: Blocks, first: int, last: int | None) -> Blocks:
    return msgspec.structs.replace(blocks, ids=blocks.ids[first:last])


def parse_faults(text: str) -> Faults:
    """Faults from JSON, as a test hands them to an engine. Raises TransferError if they do not parse."""
    try:
        return msgspec.json.decode(text, type=Faults)
    except msgspec.DecodeError as error:
        raise TransferError(f"not faults: {error}") from error


def faults_of(options: Mapping[str, Any], scheme: str) -> Faults | None:
    """One scheme's share of an instance's `faulty` option: faults for all, or faults by scheme. Raises ConfigError."""
    by_scheme = any(isinstance(value, dict) for value in options.values())
    mine = options.get(scheme) if by_scheme else options
    try:
        return msgspec.convert(mine, Faults) if mine else None
    except msgspec.ValidationError as error:
        raise ConfigError(f"faulty: {error}") from error
