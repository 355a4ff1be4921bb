"""What Baton needs of a GPU; nothing but `transport/cuda_*.py` knows about CUDA.

    Device: export ──▶ Exported (handle) ── another process ──▶ open ──▶ address here
      ├─ mark ──▶ Moment           passes when the computation given to the device until now is done
      ├─ pin ──▶ address           host memory, as the device sees it
      └─ lane ──▶ Lane.copy(..., after) ──▶ Moment       copies beside the computation, in order
               └▶ Lane.tally ──▶ Tally.add(..., after)   digests of blocks, the same way

`transport/cuda_device.py` is the real one; `transport/host_device.py` does the same with host memory and threads, so
that everything else runs, and is tested, on a machine without a GPU.
Threading: every method may be called from the engine's thread and from the endpoints' threads, and none waits for the
device, but `Lane.close`, which is called only once the lane is empty. `mark` is about the computation of the thread
that calls. A lane and its tallies are used by one thread at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Protocol

import msgspec

from transport.base import Memory
from transport.regions import Span

MAX_HANDLE_BYTES = 256


class Exported(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One allocation of device memory, so that another process of this host can map it.

    device: the GPU's own name (its UUID), the same in every process. address: in the process that exported it.
    """

    device: Annotated[str, msgspec.Meta(max_length=100)]
    address: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    num_bytes: Annotated[int, msgspec.Meta(ge=1, le=1 << 50)]
    handle: Annotated[bytes, msgspec.Meta(max_length=MAX_HANDLE_BYTES)]


class Moment(Protocol):
    """A point in the device's work."""

    def has_passed(self) -> bool:
        """Never waits. Raises TransferError if the device failed: then nothing that was given to it runs any more."""
        ...

    def release(self) -> None:
        """Nobody asks any more; what already waits for it goes on waiting."""
        ...


class Tally(Protocol):
    """A digest of blocks that the device adds up (transport/device_digest.py has the formula)."""

    def add(self, span: Span, ids: Sequence[int], seed: int, after: Moment) -> None:
        """Adds blocks, the first with this seed, each further one with one more, once `after` has passed. Returns at
        once. Raises TransferError if the device refuses."""
        ...

    def value(self) -> int | None:
        """The sum over all that was added, modulo 2^64; None while the device is at it. Raises TransferError if it
        failed."""
        ...

    def release(self) -> None:
        """Nobody asks any more."""
        ...


class Lane(Protocol):
    """An ordered queue of copies and digests, beside the computation."""

    def copy(
        self, source: Span, source_ids: Sequence[int], target: Span, target_ids: Sequence[int], after: Moment
    ) -> Moment:
        """Starts once `after` has passed and the lane's earlier copies are done. Returns at once. Raises TransferError
        if the device refuses."""
        ...

    def tally(self) -> Tally: ...

    def close(self) -> None: ...


class Device(Protocol):
    """One GPU as this process uses it."""

    def allocate(self, num_bytes: int) -> Memory | None:
        """Memory of the device; None before any of the engine's was checked: it allocates its KV cache itself. Raises
        TransferError if there is not enough."""
        ...

    def check(self, address: int, num_bytes: int) -> None:
        """Raises TransferError, with the remedy, unless this is memory that the device can copy from and to."""
        ...

    def export(self, address: int) -> Exported:
        """The whole allocation in which the address lies. Raises TransferError, with the remedy, if another process
        cannot map it."""
        ...

    def open(self, exported: Exported) -> int:
        """Maps another process's allocation: where it lies here. Raises TransferError, with the remedy, if that cannot
        be. An allocation may be opened several times; each wants its `shut`."""
        ...

    def shut(self, address: int) -> None:
        """Unmaps what `open` returned. Nothing may be copying there."""
        ...

    def mark(self) -> Moment:
        """Passes when everything is done that the computation had been given when this was called."""
        ...

    def pin(self, address: int, num_bytes: int) -> int:
        """Lets the device read and write memory of the host: at which address. Raises TransferError, with the remedy,
        if it cannot."""
        ...

    def unpin(self, address: int) -> None:
        """Before that memory is unmapped; nothing may be copying there. address: of the host's."""
        ...

    def lane(self) -> Lane: ...

    def close(self) -> None: ...
